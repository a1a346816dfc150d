"""The train step: EMA, accumulation, randomness that belongs to the item."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.training import program as program_lib
from arflow_jax.training import state
from tests.tiny import batches, tiny_config


def _setup(**overrides):
  config = tiny_config(**overrides)
  program = program_lib.build(config)
  batch = program.place(next(batches(config)))
  return program.branch, program.init(), program.step, batch


def test_init_matches_its_abstract_state():
  program = program_lib.build(tiny_config())
  real, abstract = program.init(), program.abstract_state
  describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
  assert jax.tree.map(describe, real) == jax.tree.map(describe, abstract)


def test_a_state_can_begin_with_given_weights():
  program = program_lib.build(tiny_config())
  weights = jax.tree.map(lambda p: p + 1, program.init().params)
  begun = program.init(weights)
  assert int(begun.step) == 0
  program.step(begun, program.place(next(batches(program.config))))
  for tree in (begun.params, begun.ema):  # given away, but not the weights
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights))
  for a, b in zip(*map(jax.tree.leaves, (program.init(weights).ema, weights))):
    np.testing.assert_array_equal(a, b)


def test_the_average_keeps_its_weight_over_many_steps():
  """Parameters that wander and shake, against the same average in float64."""
  decay, steps = 0.9999, 100_000
  start = np.random.RandomState(0).standard_normal(200) * 0.02
  start = start.astype(np.float32)

  def step(i, ema):
    shake = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (200,))
    params = (start * (1 + i / steps) + 0.001 * shake).astype(np.float32)
    exact, own = ema
    exact = decay * exact + (1 - decay) * params.astype(exact.dtype)
    return exact, state.average(own, params, decay)

  with jax.enable_x64(True):
    run = jax.jit(lambda ema: jax.lax.fori_loop(0, steps, step, ema))
    exact, own = run((start.astype(np.float64), start))
  assert (exact.dtype, own.dtype) == (np.float64, np.float32)
  exact, own = np.asarray(exact), np.asarray(own, np.float64)
  assert abs(own @ exact / (exact @ exact) - 1) < 1e-6
  np.testing.assert_allclose(own, exact, rtol=1e-4, atol=1e-6)


def test_ema_follows_the_parameters():
  _, current, step, batch = _setup(ema__decay=0.75)
  before = jax.tree.map(np.array, current.params)
  after, metrics = step(current, batch)
  assert int(after.step) == 1
  assert np.isfinite(metrics["loss"])
  for old, new, ema in zip(
    *map(jax.tree.leaves, (before, after.params, after.ema))
  ):
    np.testing.assert_allclose(ema, 0.75 * old + 0.25 * new, atol=1e-7)


def test_accumulation_changes_nothing_but_memory():
  _, current, step, batch = _setup()
  whole, metrics = step(current, batch)
  _, current, step, _ = _setup(optimizer__accumulation=2)
  parts, accumulated = step(current, batch)
  np.testing.assert_allclose(accumulated["loss"], metrics["loss"], rtol=1e-5)
  norm = metrics["grad_norm"]
  np.testing.assert_allclose(accumulated["grad_norm"], norm, rtol=1e-4)
  for a, b in zip(*map(jax.tree.leaves, (whole.opt_state, parts.opt_state))):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_randomness_belongs_to_the_item():
  """Each item's loss is the same alone as in its batch."""
  branch, current, _, batch = _setup()
  keys = state.item_keys(0, jnp.int32(7), 4)
  assert len({tuple(k) for k in jax.random.key_data(keys).tolist()}) == 4
  later = state.item_keys(0, jnp.int32(8), 4)
  assert not (jax.random.key_data(keys) == jax.random.key_data(later)).any()
  # A fresh network answers zero; random weights make the loss depend on all.
  params = jax.tree.map(
    lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape),
    current.params,
  )
  loss = jax.jit(branch.loss)
  whole = loss(params, batch, keys)
  for i in range(4):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
    alone = loss(params, one, keys[i : i + 1])
    np.testing.assert_allclose(alone, whole[i : i + 1], rtol=1e-5)


def test_label_dropout_takes_its_share():
  from arflow_jax.arflow import trajectory

  keys = state.item_keys(0, jnp.int32(0), 2000)
  images, labels = jnp.zeros((2000, 5, 2, 2, 1)), jnp.full(2000, 3)
  draws = trajectory.draw(
    labels, keys, images.shape[1:], null_label=10, label_dropout=0.1
  )
  noisy = trajectory.noisy_trajectory(images, draws)
  share = float((noisy.labels == 10).mean())
  assert 0.07 < share < 0.13
  assert set(np.unique(noisy.labels)) == {3, 10}
  assert (np.diff(noisy.t, axis=1) >= 0).all()
  # x = t 0 + (1 - t) noise and v = 0 - noise
  wide = noisy.t[..., None, None, None]
  np.testing.assert_allclose(noisy.x, -(1 - wide) * noisy.velocity, atol=1e-6)
  np.testing.assert_allclose(noisy.velocity.std(), 1, atol=0.01)


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    ({"optimizer__accumulation": 3}, "optimizer.accumulation=3"),
    ({"ema__decay": 1.0}, "ema.decay=1.0"),
    ({"model__label_dropout": 1.0}, "model.label_dropout=1.0"),
    ({"mesh__fsdp": 3}, "mesh.fsdp=3"),
    ({"branch": "arflw"}, "branch='arflw' is unknown; choose from"),
  ],
)
def test_bad_values_are_refused_by_name(overrides, named):
  with pytest.raises(ConfigError, match=named):
    _setup(**overrides)
