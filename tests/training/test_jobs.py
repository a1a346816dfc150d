"""Trainers of one job: all stop after the same step, or end soon."""

import json
import signal
import time

import jax
import numpy as np
import pytest

from arflow_jax.errors import STOPPED
from arflow_jax.training import listing
from tests.job import STRUCK, trainers
from tests.tiny import stored_state, tiny_config

# What happens to process 1 alone, in its fourth step.
SIGNAL = STRUCK.format(point="in a step", number="SIGTERM")
NOTICE = """
import itertools
from arflow_jax.parallel import preemption
from arflow_jax.training import program
place, calls = program.Program.place, itertools.count(1)
def placed(self, batch):
  if process == 1 and next(calls) == 4:
    preemption.notify()  # JAX's service alone hears of it
  return place(self, batch)
program.Program.place = placed
"""
NO_DATA = """
import itertools
from arflow_jax.data import pipeline
batches = pipeline.batches
def failing(*args):
  found = batches(*args)
  yield from itertools.islice(found, {count}) if process == 1 else found
  found.close()
  raise {error}("what the data did")
pipeline.batches = failing
"""


def _ended(both):
  """Exit codes and what was said; all have to end."""
  said = [process.communicate(timeout=200) for process in both]
  return [process.returncode for process in both], said


@pytest.mark.parametrize(
  ("before", "after"),
  [
    pytest.param(SIGNAL, 5, marks=pytest.mark.slow),
    pytest.param(NOTICE, None, marks=pytest.mark.slow),
    pytest.param(
      NO_DATA.format(count=5, error="OSError"), 5, marks=pytest.mark.slow
    ),
  ],
  ids=["SIGTERM", "JAX's notice", "no data"],
)
def test_what_stops_one_stops_all_after_the_same_step(before, after, tmp_path):
  """Saved, with the code for "start me again"."""
  settings = {"steps": 100_000, "checkpoint__every": 100_000}
  with trainers(tmp_path, before, **settings) as both:
    codes, said = _ended(both)
  assert codes == [STOPPED] * 2, said
  (step,) = listing.steps(str(tmp_path))
  assert f"stopped after step {step}, saved" in said[0][0]
  assert after in (None, step)
  lines = [
    text.count("process 1: no data for step 6: what") for text, _ in said
  ]
  assert lines == [0, int("islice" in before)]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("error", "count", "saved"), [("TypeError", 5, [5]), ("OSError", 0, [])]
)
def test_what_a_new_start_would_not_mend_is_an_error_in_all(
  error, count, saved, tmp_path
):
  with trainers(
    tmp_path, NO_DATA.format(count=count, error=error), steps=100_000
  ) as both:
    codes, said = _ended(both)
  assert codes == [1, 1], said
  assert listing.steps(str(tmp_path))[-1:] == saved
  assert "another process has no data for step" in said[0][1]
  assert "what the data did" in said[1][1]


@pytest.mark.slow
def test_one_that_fails_alone_ends_the_others(tmp_path):
  """Both would wait for each other for minutes."""
  before = """
from arflow_jax.data import pipeline
from arflow_jax.errors import ConfigError
def open_items(config, real=pipeline.open_items):
  if process == 1:
    raise ConfigError("no such folder here")
  return real(config)
pipeline.open_items = open_items
"""
  with trainers(tmp_path, before) as both:
    assert both[1].wait(200) == 1
    failed = time.monotonic()
    assert both[0].wait(60) == -signal.SIGABRT
    assert time.monotonic() - failed < 30


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_trainer_ends_the_other(number, lost, tmp_path):
  """Within 30 s, with the code by which every launcher starts it again."""
  with trainers(tmp_path, steps=100_000) as both:
    for line in both[0].stdout:
      if line.startswith("step "):
        break
    both[lost].send_signal(number)
    begun = time.monotonic()
    other = both[1 - lost]
    other.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert other.returncode == -signal.SIGABRT


@pytest.mark.slow
@pytest.mark.parametrize(
  ("family", "point", "number"),
  [("arflow", "in a step", "SIGTERM"), ("flowar", "in a save", "SIGKILL")],
)
def test_two_that_go_on_end_as_two_that_nobody_stopped(
  family, point, number, tmp_path
):
  """Bit for bit, on the same mesh by as many processes."""
  settings = {
    "family": family,
    "batch_size": 8,
    "steps": 12,
    "log__every": 1,
    "mesh__fsdp": 2,
  }
  struck = STRUCK.format(point=point, number=number)
  wanted = {
    "SIGTERM": [STOPPED] * 2,
    "SIGKILL": [-signal.SIGABRT, -signal.SIGKILL],
  }
  for name, before, codes in (
    ("whole", "", [0, 0]),
    ("broken", struck, wanted[number]),
    ("broken", "", [0, 0]),
  ):
    with trainers(tmp_path / name, before, devices=2, **settings) as both:
      ended, said = _ended(both)
    assert ended == codes, said
  assert "resuming" in said[0][0]
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  assert _losses(broken) == _losses(whole)
  config = tiny_config(**settings | {"mesh__fsdp": 1})
  states = [stored_state(config, run) for run in (whole, broken)]
  assert int(states[0].step) == 12
  jax.tree.map(np.testing.assert_array_equal, *states)


def _losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [(record["step"], record["loss"]) for record in records]
