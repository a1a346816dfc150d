"""Disks that fail in one of two processes, and a signal that comes late."""

import json
import re

import jax
import numpy as np
import pytest

from arflow_jax.training import listing
from tests.job import STRUCK, trainers
from tests.tiny import stored_state, tiny_config

# Each process writes half of the weights. Four saves without a fault.
RUN = {"mesh__fsdp": 2, "steps": 8, "log__every": 1}
# The first read of the weights fails in process 1.
READ = """
from orbax.checkpoint import v1 as ocp
from arflow_jax.training import listing
listing.PAUSES = (0.1, 0.1)
load, failed = ocp.load_checkpointables, []
def failing(path, wanted):
  found = load(path, wanted)
  if process == 1 and "state" in wanted and not failed:
    failed.append(1)
    raise OSError(5, "Input/output error")
  return found
ocp.load_checkpointables = failing
"""
# No file of one process can grow beyond a size while it makes some saves.
FULL = """
import itertools, resource
from arflow_jax.training import listing, saver
listing.PAUSES = (0.1, 0.1)
begin, count = saver.Saver._begin, itertools.count(1)
def full(self, *args):
  call = next(count)
  free = process != {process} or call < {first} or call > {last}
  size = resource.RLIM_INFINITY if free else 1000
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
  begin(self, *args)
saver.Saver._begin = full
"""


def _train(workdir, before, **changes):
  with trainers(workdir, before, **RUN | changes) as both:
    said = [process.communicate(timeout=200) for process in both]
  assert "Traceback" not in str(said), said
  return [process.returncode for process in both], said


def _check(workdir, **changes):
  """A whole run, and nothing besides."""
  config = tiny_config(**RUN | changes | {"mesh__fsdp": 1})
  assert int(stored_state(config, workdir).step) == config.steps
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines]
  assert steps == list(range(1, config.steps + 1))
  names = {path.name for path in workdir.rglob("*")}
  assert not [n for n in names if re.search(r"tmp|\.part$|unreadable", n)]


@pytest.mark.slow
def test_a_read_that_fails_once_in_one_costs_nothing(tmp_path):
  assert _train(tmp_path, "", steps=4)[0] == [0, 0]
  codes, said = _train(tmp_path, READ)
  assert codes == [0, 0], said
  assert f"resuming {tmp_path} after step 4" in said[0][0]
  assert "failed (process 1: " in said[0][1]
  _check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_disk_that_is_full_for_one_of_two_for_a_while(process, tmp_path):
  """The save fails for both, is told once, and made good."""
  before = FULL.format(process=process, first=2, last=3)
  codes, said = _train(tmp_path, before)
  assert codes == [0, 0], said
  told = re.findall(r"step .* could not be saved .*", said[0][0])
  why = f"could not be saved (process {process}: File too large; it needs up"
  assert [why in line for line in told] == [True] * 2, told
  assert "could not be saved" not in said[1][0]
  _check(tmp_path)
  assert listing.steps(str(tmp_path))[-1] == 8


@pytest.mark.slow
def test_a_disk_that_stays_full_for_one_of_two_ends_both(tmp_path):
  settings = {"steps": 40, "checkpoint__failures": 3}
  before = FULL.format(process=1, first=2, last=1000)
  codes, said = _train(tmp_path, before, **settings)
  assert codes == [1, 1], said
  assert all("failure 3 of checkpoint.failures=3; stop" in e for _, e in said)
  assert listing.steps(str(tmp_path)) == [2]
  # And when there is room again, it goes on.
  codes, said = _train(tmp_path, "", **settings | {"steps": 8})
  assert codes == [0, 0], said
  assert f"resuming {tmp_path} after step 2" in said[0][0]


@pytest.mark.slow
def test_a_signal_in_the_last_save_is_too_late(tmp_path):
  """Whichever process it comes to: the run is finished."""
  before = STRUCK.format(point="in the last save", number="SIGTERM")
  codes, said = _train(tmp_path / "struck", before)
  assert codes == [0, 0], said
  assert _train(tmp_path / "whole", "")[0] == [0, 0]
  _check(tmp_path / "struck")
  config = tiny_config(**RUN | {"mesh__fsdp": 1})
  states = [stored_state(config, tmp_path / n) for n in ("struck", "whole")]
  jax.tree.map(np.testing.assert_array_equal, *states)
