"""The profiler: which steps, and where its files are."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from arflow_jax.training import program as program_lib
from arflow_jax.training import telemetry, trace
from arflow_jax.training.state import TrainState
from tests.bucket import Bucket
from tests.tiny import tiny_config


def _steps(workdir, start, steps, **changes):
  """A run of a program that is quick to compile."""
  config = tiny_config(steps=9, **changes)
  log = telemetry.Telemetry(workdir, start, 9, 20)
  traced = trace.Trace(program_lib.build(config), workdir, start, log)
  state = TrainState(step=jnp.zeros(()), params={}, ema={}, opt_state={})
  step_of = jax.jit(lambda state: state.replace(step=state.step + 1))
  for step in range(start + 1, steps + 1):
    traced.between(step - 1, state, bool)
    with jax.profiler.TraceAnnotation(f"test step {step}"):
      state = step_of(state)
  if steps == 9:
    traced.between(9, state, bool)
  traced.close()


def _traced(folder):
  """The steps that are in a trace."""
  (path,) = folder.rglob("*.trace.json.gz")
  assert path.with_name(path.name.split(".")[0] + ".xplane.pb").exists()
  with gzip.open(path) as file:
    events = json.load(file)["traceEvents"]
  names = {event.get("name", "") for event in events}
  return sorted(int(x[10:]) for x in names if x.startswith("test step "))


@pytest.mark.parametrize(
  ("start", "steps", "first", "count", "found"),
  [
    (0, 9, 3, 2, [3, 4]),
    (0, 9, 9, 5, [9]),  # the run ends before
    (4, 9, 3, 4, [5, 6]),  # a launch that begins in the middle
    (0, 4, 3, 5, [3, 4]),  # one that is stopped
  ],
)
def test_the_chosen_steps_are_traced(
  start, steps, first, count, found, tmp_path, capsys
):
  changes = {"log__trace_start": first, "log__trace_steps": count}
  _steps(str(tmp_path), start, steps, **changes)
  assert _traced(tmp_path / "profile") == found
  (line,) = capsys.readouterr().out.splitlines()
  assert f"a trace of steps {found[0]} to" in line
  assert f"is in {tmp_path}/profile: open" in line


def test_a_trace_goes_to_a_bucket(tmp_path, monkeypatch):
  monkeypatch.setattr(Bucket, "ROOT", str(tmp_path))
  folder = epath.Path("bucket://name/run")
  _steps(str(folder), 0, 9, log__trace_start=2, log__trace_steps=1)
  assert _traced(tmp_path / "name" / "run" / "profile") == [2]


def test_none_is_made_unless_asked_for(tmp_path, capsys):
  _steps(str(tmp_path), 0, 9)
  _steps(str(tmp_path), 5, 9, log__trace_start=2, log__trace_steps=4)
  assert not (tmp_path / "profile").exists()
  assert capsys.readouterr().out == ""


def test_a_start_beyond_the_end_is_told(tmp_path, capsys):
  _steps(str(tmp_path), 0, 9, log__trace_start=10, log__trace_steps=1)
  assert not (tmp_path / "profile").exists()
  out = capsys.readouterr().out
  assert "no step is traced: log.trace_start=10 is beyond the last" in out
