"""What stops a run before its end: signals, data, loaders, reports."""

import itertools
import signal
import subprocess
import sys

import pytest

from arflow_jax.data import pipeline
from arflow_jax.errors import STOPPED
from arflow_jax.training import listing, loop, telemetry
from tests import faults
from tests.tiny import flags, tiny_config, trainer


@pytest.mark.parametrize(
  "number",
  [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_exits_cleanly(tmp_path, number):
  args = flags(steps=100_000, checkpoint__every=100_000)
  seen = ""
  former = signal.signal(number, signal.SIG_DFL)  # nohup would be inherited
  with trainer(tmp_path, *args) as process:
    signal.signal(number, former)
    for line in process.stdout:
      seen += line
      if line.startswith("step "):
        process.send_signal(number)
        break
    seen += process.stdout.read()
  assert process.returncode == STOPPED, seen
  assert "stopped after step" in seen
  (step,) = listing.steps(str(tmp_path))
  assert loop.train(tiny_config(steps=step + 1), str(tmp_path)) == step + 1


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path):
  """While the step compiles; the process does not wait for that."""
  with trainer(tmp_path, *flags(model__depth=12)) as process:
    for line in process.stdout:
      if "compiling" in line:
        process.send_signal(signal.SIGTERM)
        break
    said = process.stdout.read()
  assert process.returncode == STOPPED
  assert "nothing is lost, start the same command again" in said
  assert "step 1" not in said


def test_an_error_of_the_data_loses_no_state(tmp_path, monkeypatch, capsys):
  """Also where the save before it has failed."""
  batches = pipeline.batches

  def failing(items, config, start, rows):
    real = batches(items, config, start, rows)
    yield from itertools.islice(real, 4)
    real.close()
    raise OSError("the disk does not answer")

  monkeypatch.setattr(pipeline, "batches", failing)
  writer = (
    "orbax.checkpoint:v1.training.Checkpointer.save_checkpointables_async"
  )
  faults.fail(monkeypatch, writer, OSError(28, "No space left"), calls=(2,))
  assert loop.train(tiny_config(steps=9), str(tmp_path)) == 4
  assert listing.steps(str(tmp_path)) == [2, 4]
  said = capsys.readouterr().out
  assert "no data for step 5: the disk does not answer" in said
  assert "stopped after step 4, saved; start the same command again" in said


def test_an_error_of_the_first_data_is_one(tmp_path, monkeypatch):
  """Nothing is gained by starting again: no launcher does so for ever."""

  def failing(*_):
    yield from ()
    raise OSError("the disk does not answer")

  monkeypatch.setattr(pipeline, "batches", failing)
  with pytest.raises(OSError, match="does not answer"):
    loop.train(tiny_config(), str(tmp_path))


LOADER_KILLED = """
import multiprocessing, os, signal, sys, time
from arflow_jax import cli, train
from arflow_jax.training import program

place, calls = program.Program.place, []

def struck(self, batch):
  calls.append(batch)
  if len(calls) == 5:
    loaders = multiprocessing.active_children()
    for loader in loaders:
      os.kill(loader.pid, signal.SIGTERM)  # which they leave to the trainer
    time.sleep(1)  # nobody reads: pipes are full, batches cut
    assert len([x for x in loaders if x.is_alive()]) == 2
    loaders[0].kill()
  return place(self, batch)

program.Program.place = struck
sys.modules["arflow_jax.train"] = train
cli.run("arflow_jax.train")
"""


@pytest.mark.slow  # it waits for 11 s
def test_a_killed_loader_ends_a_run_that_is_saved(tmp_path):
  """In the middle of a batch that no pipe holds as a whole."""
  args = flags(
    steps=99, data__workers=2, data__sequence_length=100, batch_size=16
  )
  done = subprocess.run(
    [sys.executable, "-c", LOADER_KILLED, f"--workdir={tmp_path}", *args],
    capture_output=True,
    text=True,
    check=False,
    timeout=300,  # it hung for ever
  )
  assert done.returncode == STOPPED, done.stderr
  assert "Traceback" not in done.stderr
  step = listing.steps(str(tmp_path))[-1]
  assert step >= 5
  assert f"no data for step {step + 1}: a loader process has" in done.stdout
  assert "lower data.workers\n" in done.stdout
  assert f"stopped after step {step}, saved" in done.stdout


def test_a_report_that_cannot_be_written_comes_after_the_checkpoint(
  tmp_path, monkeypatch
):
  def full(self, step, metrics, **kwargs):
    if step == 2:
      raise OSError("No space left on device")

  monkeypatch.setattr(telemetry.Telemetry, "report", full)
  with pytest.raises(OSError, match="No space"):
    loop.train(tiny_config(), str(tmp_path))
  assert listing.steps(str(tmp_path)) == [2]
