"""Signals at every named point: the same command goes on to the same end."""

import functools
import json
import pathlib
import signal
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from arflow_jax.errors import STOPPED
from arflow_jax.training import loop, telemetry
from tests import faults
from tests.tiny import flags, stored_state, tiny_config

CHANGES = {"steps": 8, "checkpoint__every": 3}
SIGNALS = [signal.SIGTERM, signal.SIGKILL]
ENDS = {
  signal.SIGTERM: STOPPED,
  signal.SIGINT: 130,
  signal.SIGKILL: -signal.SIGKILL,
}
RUN = "tests/sampling/tiny_run"
# Where nothing is interrupted any more: the process ends as it would have.
TOO_LATE = ("in the last save",)


def _finish(*command):
  done = subprocess.run(
    [sys.executable, "-m", *command],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


@functools.cache
def _undisturbed(family):
  workdir = tempfile.mkdtemp()
  loop.train(tiny_config(family, **CHANGES), workdir)
  return workdir


def _records(workdir):
  with open(f"{workdir}/metrics.jsonl") as file:
    records = [json.loads(line) for line in file]
  for record in records:
    for name in telemetry.MEASURED:
      record.pop(name, None)
  return records


def _interrupt_training(family, point, number, workdir):
  command = [
    "arflow_jax.train",
    *flags(family, **CHANGES),
    f"--workdir={workdir}",
  ]
  if point == "restoring":  # there has to be something
    loop.train(tiny_config(family, **CHANGES | {"steps": 4}), str(workdir))
  struck = faults.run_struck(point, number, *command)
  wanted = ENDS[number]
  if number == signal.SIGTERM and point in TOO_LATE:
    wanted = 0
  assert struck.returncode == wanted, struck.stderr
  assert "Traceback" not in struck.stderr
  if point == "in a save" and number == signal.SIGKILL:
    assert list(workdir.glob("checkpoints/*tmp*"))  # it was in the save
  config = tiny_config(family, **CHANGES)
  assert loop.train(config, str(workdir)) == 8
  other = _undisturbed(family)
  assert _records(workdir) == _records(other)
  ours, theirs = stored_state(config, workdir), stored_state(config, other)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  left = {path.name for path in workdir.rglob("*")}
  assert not [name for name in left if "tmp" in name or name.endswith(".part")]


@pytest.mark.slow
def test_a_run_killed_in_a_save_ends_as_an_undisturbed_one(tmp_path):
  """The short form of the walk below."""
  _interrupt_training("arflow", "in a save", signal.SIGKILL, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("point", faults.TRAINING)
@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_training_walk(family, point, number, tmp_path):
  _interrupt_training(family, point, number, tmp_path)


@functools.cache
def _drawn():
  folder = tempfile.mkdtemp()
  _finish("arflow_jax.sample", f"--workdir={RUN}", f"--out={folder}/images")
  return _pictures(f"{folder}/images")


def _pictures(folder):
  return {
    path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()
  }


@pytest.mark.slow
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGINT])
@pytest.mark.parametrize("point", faults.DRAWING)
def test_drawing_walk(point, number, tmp_path):
  command = [
    "arflow_jax.sample",
    f"--workdir={RUN}",
    f"--out={tmp_path}/images",
  ]
  struck = faults.run_struck(point, number, *command)
  wanted = ENDS[number]
  assert struck.returncode == wanted, struck.stderr
  assert "Traceback" not in struck.stderr
  assert not (tmp_path / "images").exists()
  _finish(*command)
  assert _pictures(tmp_path / "images") == _drawn()
  assert [path.name for path in tmp_path.iterdir()] == ["images"]
