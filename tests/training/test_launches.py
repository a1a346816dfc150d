"""Goodput across launches, by a clock of the test's own."""

import json

import pytest
from etils import epath

from arflow_jax.training import launches


@pytest.fixture
def clock(monkeypatch):
  """Seconds, as a list of one."""
  now = [1000.0]
  monkeypatch.setattr(launches.time, "time", lambda: now[0])
  return now


def _launch(folder, start, clock, at):
  clock[0] = 1000.0 + at
  return launches.Launches(epath.Path(folder), start, {"devices": 1})


def _report(launch, clock, at, *args):
  clock[0] = 1000.0 + at
  return launch.report(*args)


def test_steps_that_were_lost_and_time_between_launches_are_not_kept(
  tmp_path, clock
):
  first = _launch(tmp_path, 0, clock, 0)
  assert _report(first, clock, 10, 1, 0.0) == 0  # it compiled
  assert _report(first, clock, 20, 11, 10.0) == 10 / 20
  assert _report(first, clock, 30, 21, 10.0) == 20 / 30  # killed after this
  second = _launch(tmp_path, 11, clock, 40)  # a checkpoint of step 11
  assert second.count == 2
  assert _report(second, clock, 50, 12, 0.0) == 10 / 50
  assert _report(second, clock, 60, 21, 10.0) == 20 / 60
  third = _launch(tmp_path, 21, clock, 60)  # it was stopped, at once
  assert _report(third, clock, 100, 61, 40.0) == 60 / 100
  steps = [
    x["step"] for x in launches.read(epath.Path(tmp_path)) if "launch" in x
  ]
  assert steps == [0, 11, 21]


def test_a_line_that_a_crash_cut_off_hides_no_other(tmp_path, clock):
  first = _launch(tmp_path, 0, clock, 0)
  _report(first, clock, 10, 1, 8.0)
  _report(first, clock, 20, 2, 8.0)
  path = tmp_path / launches.NAME
  path.write_bytes(path.read_bytes()[:-7])
  second = _launch(tmp_path, 1, clock, 20)
  assert _report(second, clock, 32, 2, 8.0) == 16 / 32
  kept = [x.get("kept") for x in launches.read(epath.Path(tmp_path))]
  assert kept == [None, 8.0, None, 16.0]
  for line in path.read_text().splitlines()[3:]:  # all but the one cut off
    json.loads(line)


def test_a_clock_that_is_set_back_makes_no_share_above_one(tmp_path, clock):
  launch = _launch(tmp_path, 0, clock, 0)
  assert _report(launch, clock, -50, 5, 20.0) == 1.0


def test_a_run_of_an_earlier_version_counts_from_now(tmp_path, clock):
  launch = _launch(tmp_path, 500, clock, 0)
  assert _report(launch, clock, 10, 510, 5.0) == 0.5
