"""AdamW, its decay groups, clipping and schedules against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arflow_jax import branches
from arflow_jax.errors import ConfigError
from arflow_jax.training.optimizer import (
  decay_mask,
  learning_rate,
  make_optimizer,
)
from configs.arflow import get_config
from tests.tiny import tiny_config

AXES = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}


def _config(**changes):
  config = get_config("imagenet128-s2").optimizer.copy_and_resolve_references()
  with config.unlocked():
    config.update(changes)
  return config


@pytest.mark.parametrize("clip", ["none", "value", "global_norm"])
def test_adamw_against_float64(clip):
  config = _config(
    clip=clip, clip_threshold=0.5, weight_decay=0.1, peak_lr=0.01
  )
  rs = np.random.RandomState(0)
  params = {"kernel": rs.standard_normal((3, 2)), "bias": rs.standard_normal(2)}
  tx = make_optimizer(config, AXES)
  ours = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
  state = tx.init(ours)
  m = {k: np.zeros_like(v) for k, v in params.items()}
  s = {k: np.zeros_like(v) for k, v in params.items()}
  for t in range(1, 6):
    grads = {k: rs.standard_normal(v.shape) for k, v in params.items()}
    as32 = {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}
    updates, state = tx.update(as32, state, ours)
    ours = optax.apply_updates(ours, updates)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for k, g in grads.items():
      if clip == "value":
        g = np.clip(g, -0.5, 0.5)
      elif clip == "global_norm":
        g = g * min(1, 0.5 / norm)
      m[k] = 0.9 * m[k] + 0.1 * g
      s[k] = 0.95 * s[k] + 0.05 * g**2
      adam = (m[k] / (1 - 0.9**t)) / (np.sqrt(s[k] / (1 - 0.95**t)) + 1e-8)
      decay = 0.1 if k == "kernel" else 0.0
      params[k] = params[k] - 0.01 * (adam + decay * params[k])
  for k in params:
    np.testing.assert_allclose(ours[k], params[k], atol=1e-6)


@pytest.mark.parametrize(
  ("family", "changes"),
  [("arflow", {}), ("flowar", {"model__cross_attention": True})],
)
def test_decay_groups_are_the_published_ones(family, changes):
  """What has two or more axes in the published layout decays, all else not."""
  branch = branches.build(tiny_config(family, **changes))
  abstract = jax.eval_shape(branch.init, jax.random.key(0))
  marked = jax.tree.map(
    lambda array, decays: np.full(array.shape, decays, np.float32),
    abstract,
    decay_mask(branch.axes),
  )
  zeros = jax.tree.map(np.zeros_like, marked)
  buffers = branch.to_published(zeros)
  found = branch.to_published(marked)
  parameters = [name for name in found if not buffers[name].any()]
  assert len(parameters) > 20
  for name in parameters:
    assert found[name].all() == (found[name].ndim >= 2), name
    assert found[name].any() == found[name].all()


def test_schedules():
  constant = learning_rate(_config(peak_lr=2.0, warmup_steps=4))
  values = [float(constant(i)) for i in range(6)]
  np.testing.assert_allclose(values, [0.5, 1, 1.5, 2, 2, 2])
  assert float(learning_rate(_config(peak_lr=2.0))(0)) == 2.0
  cosine = learning_rate(
    _config(peak_lr=1.0, warmup_steps=10, schedule="cosine", decay_steps=110)
  )
  np.testing.assert_allclose(cosine(10), 1.0, rtol=1e-6)
  np.testing.assert_allclose(cosine(60), 0.505, rtol=1e-3)
  np.testing.assert_allclose(cosine(110), 0.01, rtol=1e-5)
  np.testing.assert_allclose(cosine(10_000), 0.01, rtol=1e-5)
  ends = _config(
    peak_lr=2.0, schedule="cosine", decay_steps=10, final_fraction=0.25
  )
  np.testing.assert_allclose(learning_rate(ends)(10), 0.5, rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"schedule": "linear"}, "optimizer.schedule='linear'"),
    ({"clip": "norm"}, "optimizer.clip='norm'"),
    ({"schedule": "cosine", "decay_steps": 0}, "optimizer.decay_steps=0"),
  ],
)
def test_bad_values_are_refused_by_name(changes, named):
  with pytest.raises(ConfigError, match=named):
    make_optimizer(_config(**changes), AXES)
