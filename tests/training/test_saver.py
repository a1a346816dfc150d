"""Saves that fail: said at once in one line, made good, nothing left over."""

import concurrent.futures
import contextlib
import gc
import json
import time

import jax
import numpy as np
import pytest

from arflow_jax.training import listing, loop, telemetry
from arflow_jax.training import program as program_lib
from arflow_jax.training.saver import Saver
from tests import faults
from tests.tiny import flags, stored_state, tiny_config, trainer

CONFIG = tiny_config(checkpoint__failures=3)


@pytest.fixture(scope="module")
def state():
  return program_lib.build(CONFIG).init()


@pytest.fixture
def saver(tmp_path, state):
  with contextlib.closing(Saver(str(tmp_path), CONFIG, state)) as saver:
    yield saver


def _failed(saver):
  """Whether the save has failed and is to be made again at once."""
  concurrent.futures.wait([saver._pending])
  return saver.failed() and saver.mend()


def _names(tmp_path):
  return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def test_a_failed_save_is_said_in_one_line_and_made_good(
  saver, state, tmp_path, capfd
):
  saver.save(1, state, {})
  assert not _failed(saver)
  with faults.files_end_at(20_000) as lift:
    saver.save(2, state, {})
    assert _failed(saver)  # again at once
    saver.save(3, state, {})
    assert not _failed(saver)  # then with the next checkpoint
    lift()
    out, err = capfd.readouterr()
  assert err == ""
  first, second = out.splitlines()
  assert first.startswith(
    "step 2 could not be saved (File too large; it needs up to 246kB, "
  )
  assert first.endswith(
    f"B are free in {tmp_path}), failure 1 of checkpoint.failures=3; training"
    " goes on"
  )
  assert second.startswith("step 3 could not be saved")
  assert "failure 2 of" in second
  gc.collect()  # nothing is left that Python would warn of, which fails here
  saver.save(4, state, {})
  (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(
    exist_ok=True
  )  # a late one
  assert not saver.mend()
  assert _names(tmp_path) == ["1", "4"]  # and nothing of the failed ones
  back = stored_state(CONFIG, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, back, state)


def test_so_many_failures_in_a_row_are_an_error(saver, state, tmp_path):
  with faults.files_end_at(20_000):
    for step in (1, 2):
      saver.save(step, state, {})
      _failed(saver)
    saver.save(3, state, {})
    with pytest.raises(OSError, match=r"failure 3 of .*=3; stopped: start"):
      _failed(saver)


@pytest.mark.slow
def test_the_count_begins_anew_after_a_good_save(saver, state):
  for first in (1, 5):
    with faults.files_end_at(20_000):
      for step in (first, first + 1):
        saver.save(step, state, {})
        _failed(saver)
    saver.save(first + 2, state, {})
    assert not _failed(saver)


def test_a_failure_is_never_overlooked(saver, state, capsys):
  """Also where the next save begins before anybody has asked."""
  with faults.files_end_at(20_000):
    saver.save(1, state, {})
    saver.save(2, state, {})
  assert "step 1 could not be saved" in capsys.readouterr().out


def test_the_last_save_is_tried_three_times(
  saver, state, tmp_path, capsys, monkeypatch
):
  save = "orbax.checkpoint:v1.save_checkpointables_async"
  error = OSError(5, "Input/output error")
  faults.fail(monkeypatch, save, error, calls=(1, 2))
  saver.finish(4, state, {"steps": 1.0})
  assert listing.steps(str(tmp_path)) == [4]
  out = capsys.readouterr().out
  assert out.count("could not be saved (Input/output error;") == 2
  faults.fail(monkeypatch, save, error, calls=None)
  with pytest.raises(OSError, match=r"step 5 could not be saved .* is lost"):
    saver.finish(5, state, {})


@pytest.mark.parametrize("end", ["", "-removed"])
def test_leftovers_are_removed_at_the_start(end, state, tmp_path):
  left = tmp_path / "checkpoints" / f"7.orbax-checkpoint-tmp{end}" / "state"
  left.mkdir(parents=True)
  (left / "array").write_bytes(b"0" * 1000)
  assert listing.steps(str(tmp_path)) == []
  with contextlib.closing(Saver(str(tmp_path), CONFIG, state)) as saver:
    saver.finish(8, state, {})
  assert _names(tmp_path) == ["8"]


def test_training_outlives_a_disk_that_is_full_for_a_while(
  tmp_path, monkeypatch, capsys
):
  """No room for checkpoints or records from step 3 to step 6."""
  config = tiny_config(steps=8, checkpoint__every=2, log__every=1)
  loop.train(config, str(tmp_path / "undisturbed"))
  run = tmp_path / "run"
  report = telemetry.Telemetry.report
  with contextlib.ExitStack() as stack:

    def filling(self, step, *args, **kwargs):
      if step == 3:
        stack.enter_context(faults.files_end_at(100))
      if step == 6:
        stack.close()
      report(self, step, *args, **kwargs)

    monkeypatch.setattr(telemetry.Telemetry, "report", filling)
    assert loop.train(config, str(run)) == 8
  out, err = capsys.readouterr()
  assert "Traceback" not in err
  assert "metrics.jsonl could not be written (File too large)" in out
  assert _names(run)[-1] == "8"
  losses = [
    [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    for path in sorted(tmp_path.glob("*/metrics.jsonl"))
  ]
  assert losses[0] == losses[1]
  assert len(losses[0]) == 8
  jax.tree.map(
    np.testing.assert_array_equal,
    stored_state(config, run),
    stored_state(config, tmp_path / "undisturbed"),
  )


@pytest.mark.slow
def test_a_run_that_outlived_failed_saves_ends_soon(tmp_path):
  """Threads of theirs would hold up the exit for minutes, and then speak."""
  args = flags(steps=400, checkpoint__every=10, log__every=10)
  with trainer(tmp_path, *args) as process:
    for line in process.stdout:
      if "10/" in line:
        break
    with faults.small_disk(tmp_path / "checkpoints", 1, "ro"):
      time.sleep(0.6)
    said = process.stdout.read()
  assert process.returncode == 0, said
  last = said.splitlines()[-2]  # then it says where its curves are
  assert last.startswith("finished 400 steps"), said
  assert "could not be saved" in said
  assert _names(tmp_path)[-1] == "400"


@pytest.mark.slow
def test_a_small_disk_fills_up(tmp_path, capfd):
  """The checkpoints that are there stay good; the end is an error."""
  config = tiny_config(steps=20, checkpoint__keep=20)
  with faults.small_disk(tmp_path / "small", 2_000_000) as folder:
    with pytest.raises(OSError, match="No space left on device; it needs"):
      loop.train(config, str(folder / "run"))
    steps = listing.steps(str(folder / "run"))
    assert int(stored_state(config, folder / "run").step) == steps[-1]
  out, err = capfd.readouterr()
  assert err == ""
  assert out.count("could not be saved") >= 3
  assert len(out.splitlines()) < 40


def test_a_save_is_due_by_the_clock_as_well(tmp_path, state, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  config = tiny_config(checkpoint__minutes=2.0)
  with contextlib.closing(Saver(str(tmp_path), config, state)) as saver:
    found = []
    for now[0] in (119.0, 120.0):
      found.append(saver.due())
    saver.save(1, state, {})
    for now[0] in (239.0, 240.0):
      found.append(saver.due())
    assert found == [False, True, False, True]
    with monkeypatch.context() as other:
      other.setattr("arflow_jax.parallel.processes.speaks", lambda: False)
      assert not saver.due()  # one clock for all
  with contextlib.closing(Saver(str(tmp_path), CONFIG, state)) as saver:
    now[0] += 1e9
    assert not saver.due()  # 0 minutes: by steps alone


def test_training_saves_when_the_minutes_have_passed(tmp_path, monkeypatch):
  """And counts them from there."""
  due = iter([False, False, True, False, False, False])
  monkeypatch.setattr(Saver, "due", lambda self: next(due))
  config = tiny_config(steps=6, checkpoint__every=5, checkpoint__keep=9)
  assert loop.train(config, str(tmp_path)) == 6
  assert listing.steps(str(tmp_path)) == [3, 5, 6]
