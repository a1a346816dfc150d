"""What TensorBoard shows of a run, crashes included."""

import importlib
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from etils import epath

from arflow_jax.training import telemetry
from arflow_jax.training.telemetry import Telemetry
from tests import job
from tests.bucket import Bucket


@pytest.fixture
def scalars(monkeypatch):
  """Reads a folder with both of TensorBoard's readers: tag -> steps, values."""
  # TensorBoard has a name for "without TensorFlow", which takes 5 s to import.
  monkeypatch.setitem(
    sys.modules, "tensorboard.compat.notf", types.ModuleType("notf")
  )
  processing = "tensorboard.backend.event_processing"
  old = importlib.import_module(f"{processing}.event_accumulator")
  new = importlib.import_module(f"{processing}.plugin_event_accumulator")
  tensor_util = importlib.import_module("tensorboard.util.tensor_util")

  def read(folder):
    found = old.EventAccumulator(str(folder)).Reload()
    scalars = {
      tag: [(event.step, event.value) for event in found.Scalars(tag)]
      for tag in found.Tags()["scalars"]
    }
    shown = new.EventAccumulator(str(folder)).Reload()
    for tag, events in scalars.items():
      values = [
        (event.step, tensor_util.make_ndarray(event.tensor_proto))
        for event in shown.Tensors(tag)
      ]
      assert values == events
    return scalars

  return read


def _launch(folder, start, steps, shift=0.0):
  log = Telemetry(str(folder), start, 10, 20)
  log.start_clock(start)
  for step in range(start + 1, steps + 1):
    log.report(step, {"loss": step + shift, "grad_norm": 2.0 * step})


@pytest.fixture(params=["", "bucket://name/"], ids=["local", "bucket"])
def folders(request, tmp_path, monkeypatch):
  """Where a run is written to, and where that lies on the disk."""
  monkeypatch.setattr(Bucket, "ROOT", str(tmp_path))
  if request.param:
    return epath.Path("bucket://name/run"), tmp_path / "name" / "run"
  return tmp_path / "run", tmp_path / "run"


def test_tensorboard_shows_each_step_once(folders, scalars):
  folder, disk = folders
  _launch(folder, 0, 5)
  _launch(folder, 2, 4, shift=0.5)  # after a crash, from the checkpoint of 2
  _launch(folder, 4, 6, shift=0.25)  # after a stop
  wanted = [(1, 1), (2, 2), (3, 3.5), (4, 4.5), (5, 5.25), (6, 6.25)]
  read = scalars(disk)
  assert read["loss"] == wanted
  assert read["grad_norm"] == [(step, 2.0 * step) for step in range(1, 7)]
  _launch(folder, 0, 1, shift=0.75)  # a crash before the first checkpoint
  assert scalars(disk)["loss"] == [(1, 1.75)]


def test_a_record_that_a_crash_cut_off_hides_no_other(tmp_path, scalars):
  _launch(tmp_path, 0, 3)
  (events,) = tmp_path.glob("events.*")
  events.write_bytes(events.read_bytes()[:-10])
  _launch(tmp_path, 2, 4)
  assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3, 4]


def test_steps_show_at_once(tmp_path, scalars):
  Telemetry(str(tmp_path), 0, 4, 20).report(1, {"loss": 0.5})
  assert scalars(tmp_path)["loss"] == [(1, 0.5)]


def test_progress_is_written_without_tensorflow(tmp_path, scalars):
  program = (
    "import sys; sys.modules['tensorflow'] = None\n"
    "from arflow_jax.training.telemetry import Telemetry\n"
    f"log = Telemetry({str(tmp_path)!r}, 0, 4, 20)\n"
    "log.report(1, {'loss': 0.5}); log.start_clock(1)\n"
    "log.report(3, {'loss': 0.25})\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stderr == ""
  first, second = done.stdout.splitlines()
  assert first == "step 1/4  loss 0.5000"
  assert "images/s" in second
  assert "left" in second
  records = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert '"loss": 0.25' in records[1]
  read = scalars(tmp_path)
  assert read["loss"] == [(1, 0.5), (3, 0.25)]
  assert [step for step, _ in read["images_per_second"]] == [3]
  assert np.isfinite(read["images_per_second"][0][1])


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass as the test says, as a list of one."""
  now = [0.0]
  monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
  return now


def _records(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_waiting_is_told_and_saving_is_no_part_of_a_step(
  tmp_path, clock, capsys
):
  def loader():
    while True:
      clock[0] += 1  # a second for a batch
      yield {}

  log = Telemetry(str(tmp_path), 0, 9, 20, ideal=1.0)
  batches = log.timed(loader())
  for step in range(1, 6):
    log.begin()
    next(batches)
    log.started()
    clock[0] += 3  # and three for the rest of the step
    if step in (1, 3, 5):
      log.report(step, {"loss": 1.0})
      clock[0] += 100  # to save, and to draw
      if step == 1:
        log.start_clock(1)
  first, *others = _records(tmp_path)
  assert first == {"step": 1, "loss": 1.0}
  for found in others:
    assert found["step_time"] == 4.0
    assert found["images_per_second"] == 5.0
    assert found["input_wait"] == found["mfu"] == 0.25
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].endswith("  MFU 25.0%  25% waiting for data")
  assert "5 images/s" in lines[1]


def test_what_is_as_it_should_be_is_not_told(tmp_path, clock, capsys):
  log = Telemetry(str(tmp_path), 0, 9, 20)
  batches = log.timed(iter([{}] * 9))
  log.start_clock(0)
  for step in (1, 2):
    log.begin()
    next(batches)
    clock[0] += 1
    log.report(step, {"loss": 1.0})
  assert [record["input_wait"] for record in _records(tmp_path)] == [0, 0]
  assert "mfu" not in _records(tmp_path)[1]
  assert capsys.readouterr().out.splitlines() == [
    "step 1/9  loss 1.0000  20 images/s  8s left",
    "step 2/9  loss 1.0000  20 images/s  7s left",
  ]


def test_data_that_end_or_fail_do_so_through_the_clock(tmp_path):
  log = Telemetry(str(tmp_path), 0, 9, 20)
  assert list(log.timed(iter([1, 2]))) == [1, 2]

  def failing():
    yield 1
    raise OSError("no answer")

  batches = log.timed(failing())
  next(batches)
  with pytest.raises(OSError, match="no answer"):
    next(batches)


SLOW = """
import time
from arflow_jax.parallel import processes
processes.start()
import jax
from arflow_jax.training.telemetry import Telemetry
late = 0.2 * jax.process_index()
def loader():
  while True:
    time.sleep(late)
    yield {}
log = Telemetry({folder!r}, 0, 9, 20)
batches = log.timed(loader())
for step in range(1, 4):
  log.begin()
  next(batches)
  log.started()
  processes.meet()
  log.report(step, {"loss": 1.0})
  if step == 1:
    log.start_clock(1)
"""


def test_the_slowest_of_two_processes_is_named(tmp_path):
  program = SLOW.replace("{folder!r}", repr(str(tmp_path)))
  said, nothing = job.two_processes(program)
  assert nothing == []
  found = _records(tmp_path)[-1]
  assert found["slowest_process"] == 1
  assert 0.1 < found["skew"] < 0.6
  assert found["input_wait"] > 0.3  # of the one that waited longer
  assert re.search(r"waiting for data  process 1 \d+ ms late$", said[-1])
