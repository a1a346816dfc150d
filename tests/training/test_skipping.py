"""Steps whose gradient is not finite, where they may be skipped."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.data import pipeline
from arflow_jax.training import loop
from arflow_jax.training import program as program_lib
from tests.tiny import batches, stored_state, tiny_config

CONFIG = tiny_config(
  optimizer__skip_nonfinite=True, steps=6, checkpoint__every=3, log__every=3
)


def _poison(monkeypatch, *steps):
  """Makes the images of some steps NaN."""
  real = pipeline.batches

  def poisoned(items, config, start, rows):
    for step, batch in enumerate(real(items, config, start, rows), start + 1):
      if step in steps:
        batch = batch | {"images": np.full_like(batch["images"], math.nan)}
      yield batch

  monkeypatch.setattr(pipeline, "batches", poisoned)


def _given(**metrics):
  return {name: jnp.float32(value) for name, value in metrics.items()}


def test_a_skipped_step_changes_the_count_alone():
  program = program_lib.build(CONFIG)
  batch = next(batches(CONFIG))
  bad = batch | {"images": np.full_like(batch["images"], math.nan)}
  state, metrics = program.step(program.init(), program.place(batch))
  assert float(metrics["skipped"]) == 0
  before = jax.tree.map(np.array, state)
  state, metrics = program.step(state, program.place(bad))
  assert float(metrics["skipped"]) == 1
  assert not np.isfinite(metrics["grad_norm"])
  assert np.isfinite(metrics["param_norm"])
  wanted = before.replace(step=before.step + 1)
  jax.tree.map(np.testing.assert_array_equal, state, wanted)


@pytest.mark.slow
def test_a_good_step_is_what_it_is_without_the_key():
  found = []
  for config in (CONFIG, tiny_config()):
    program = program_lib.build(config)
    batch = program.place(next(batches(config)))
    found.append(program.step(program.init(), batch)[0])
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_run_goes_on_and_counts_them(tmp_path, monkeypatch, capsys):
  _poison(monkeypatch, 2, 4, 5, 6)
  assert loop.train(CONFIG, str(tmp_path)) == 6
  said = capsys.readouterr().out
  assert said.count(": its update is skipped") == 4
  assert "at step 2: its update" in said
  found = _records(tmp_path)
  assert [found[step]["skipped"] for step in (1, 3, 6)] == [0, 1, 3]
  assert "loss" in found[3]
  assert "loss" not in found[6]  # none of its steps has one
  assert int(stored_state(CONFIG, tmp_path).step) == 6


@pytest.mark.slow
def test_an_interruption_changes_no_count(tmp_path, monkeypatch):
  _poison(monkeypatch, 2, 4, 5, 6)
  whole, pieces = tmp_path / "whole", tmp_path / "pieces"
  loop.train(CONFIG, str(whole))
  for steps in (5, 6):
    config = CONFIG.copy_and_resolve_references()
    config.steps = steps
    loop.train(config, str(pieces))
  ours, theirs = _records(whole), _records(pieces)
  for step in (1, 3, 6):
    for name in ("skipped", "loss", "grad_norm"):
      assert ours[step].get(name) == theirs[step].get(name)
  trees = [stored_state(CONFIG, run) for run in (whole, pieces)]
  jax.tree.map(np.testing.assert_array_equal, *trees)


def _records(run):
  lines = (run / "metrics.jsonl").read_text().splitlines()
  return {line["step"]: line for line in map(json.loads, lines)}


def test_ten_in_a_row_are_an_error():
  metrics = loop._Metrics({})
  bad = _given(loss=np.nan, grad_norm=np.inf, skipped=1)
  good = _given(loss=2, grad_norm=1, skipped=0)
  for step in range(1, 21):
    metrics.add(step, good if step == 10 else bad)
  with pytest.raises(FloatingPointError, match="is inf at step 20, the 10th"):
    metrics.means()
  counted = {"steps": 19, "skipped": 18}
  assert metrics.window == {"loss": 2, "grad_norm": 1} | counted


def test_weights_that_are_not_finite_are_an_error_anyway():
  metrics = loop._Metrics({})
  metrics.add(1, _given(loss=1, skipped=0, param_norm=np.inf))
  with pytest.raises(FloatingPointError, match="param_norm is inf at step 1"):
    metrics.means()
