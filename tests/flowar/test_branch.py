"""FlowAR under the promises of the trainer: items, resumption."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax import branches
from arflow_jax.errors import ConfigError
from arflow_jax.flowar import objective
from arflow_jax.flowar.layers import Dropout
from arflow_jax.training import loop, optimizer, state
from configs.flowar import get_config
from tests.tiny import batches, random_params, stored_state, tiny_config


def _params(branch):
  return random_params(jax.eval_shape(branch.init, jax.random.key(0)))


def test_randomness_belongs_to_the_item():
  """Noise, levels, dropout: an item's loss is the same alone."""
  config = tiny_config("flowar")
  branch = branches.build(config)
  params = _params(branch)
  batch = jax.tree.map(jnp.asarray, next(batches(config, 0)))
  keys = state.item_keys(0, jnp.int32(7), 4)
  loss = jax.jit(branch.loss)
  whole = loss(params, batch, keys)
  for i in range(4):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
    alone = loss(params, one, keys[i : i + 1])
    np.testing.assert_allclose(alone, whole[i : i + 1], rtol=1e-5)
  assert np.abs(loss(params, batch, keys[::-1]) - whole).min() > 1e-4


def test_dropout_and_label_dropout_take_their_share(monkeypatch):
  keys = state.item_keys(0, jnp.int32(0), 50)
  drop = Dropout(0.1, keys)
  x = jnp.ones((50, 30, 40))
  first, second = drop(x), drop(x)
  assert abs(float((first == 0).mean()) - 0.1) < 0.005
  np.testing.assert_allclose(first.max(), 1 / 0.9, rtol=1e-3)
  np.testing.assert_allclose(first.mean(), 1, atol=0.01)
  assert (first != second).any()  # each place draws its own
  assert (first[0] != first[1]).any()

  branch = branches.build(tiny_config("flowar", model__label_dropout=0.9))
  seen = []

  def record(network, latents, labels, draws):
    seen.append(labels)
    return jnp.zeros(len(labels))

  monkeypatch.setattr(objective, "loss", record)
  keys = state.item_keys(0, jnp.int32(0), 1000)
  batch = {"images": jnp.zeros((1000, 1, 8, 8, 1)), "labels": jnp.full(1000, 3)}
  branch.loss(_params(branch), batch, keys)
  assert abs(float((seen[0] == 10).mean()) - 0.9) < 0.03
  assert set(np.unique(seen[0])) == {3, 10}


def test_dropout_acts_at_four_places_of_every_block(monkeypatch):
  sites = []

  def record(self, x):
    sites.append(x.shape)
    return x

  branch = branches.build(tiny_config("flowar"))
  params = _params(branch)
  batch = {"images": jnp.ones((4, 1, 8, 8, 1)), "labels": jnp.arange(4)}
  keys = state.item_keys(0, jnp.int32(0), 4)
  on = branch.loss(params, batch, keys)
  off = branches.build(tiny_config("flowar", model__dropout=0.0)).loss(
    params, batch, keys
  )
  assert np.abs(on - off).min() > 1e-4
  monkeypatch.setattr(Dropout, "__call__", record)
  jax.eval_shape(branch.loss, params, batch, keys)
  # One block is traced for each half: attention, its result, gate, result.
  block = [(4, 2, 85, 85), (4, 85, 16), (4, 85, 42), (4, 85, 16)]
  assert sites == 2 * block


@pytest.mark.parametrize(
  ("size", "sampling"),
  [("s", (25, 4.3, 0.1)), ("l", (25, 2.4, 0.1)), ("h", (50, 2.4, 0.3))],
)
def test_presets_hold_the_published_recipe(size, sampling):
  config = get_config("imagenet256-" + size)
  sample = config.sample
  found = (sample.num_steps, sample.guidance, sample.guidance_low)
  assert found == sampling
  rate = optimizer.learning_rate(config.optimizer)
  assert config.batch_size == 2048
  np.testing.assert_allclose(rate(62_500), 4e-4, rtol=1e-4)
  np.testing.assert_allclose(rate(250_000), 1e-5, rtol=1e-4)
  assert config.steps == 250_000
  wanted = ("global_norm", 3.0, 0.02, 0.9, 0.95)
  group = config.optimizer
  found = (group.clip, group.clip_threshold, group.weight_decay)
  assert (*found, group.b1, group.b2) == wanted
  assert (config.model.dropout, config.model.label_dropout) == (0.1, 0.1)
  with pytest.raises(ConfigError, match=r"latents.*16 x 16 x 16"):
    next(batches(config, 0))


def test_levels_are_uniform_one_for_each_scale():
  branch = branches.build(tiny_config("flowar"))
  network = branch.network(_params(branch))
  draws = objective.draw(state.item_keys(0, jnp.int32(0), 2000), network.config)
  assert draws.levels.shape == (2000, 4)
  np.testing.assert_allclose(draws.levels.mean(0), 0.5, atol=0.03)
  integers = objective.integer_levels(draws.levels)
  assert (integers.min(), integers.max()) == (0, 999)
  corner = np.corrcoef(np.asarray(draws.levels).T) - np.eye(4)
  assert np.abs(corner).max() < 0.1
  np.testing.assert_allclose(draws.noise.std(), 1, atol=0.01)


# Two scales: less to compile.
SMALL = {"model__patch_size": 4, "model__scales": (1, 2)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """The state after four steps without a break, on one device."""
  workdir = tmp_path_factory.mktemp("straight")
  config = tiny_config("flowar", **SMALL)
  loop.train(config, str(workdir))
  return stored_state(config, workdir)


@pytest.mark.slow
def test_two_and_two_steps_are_four_bit_for_bit(straight, tmp_path):
  config = tiny_config("flowar", **SMALL)
  loop.train(tiny_config("flowar", steps=2, **SMALL), str(tmp_path))
  loop.train(config, str(tmp_path))
  broken = stored_state(config, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, straight, broken)


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    ({"data__sequence_length": 5}, "data.sequence_length=5"),
    ({"model__label_dropout": 1.0}, "model.label_dropout=1.0"),
    ({"model__scales": (1, 3, 8)}, r"model.scales=\(1, 3, 8\)"),
  ],
)
def test_bad_values_are_refused_by_name(overrides, named):
  with pytest.raises(ConfigError, match=named):
    branches.build(tiny_config("flowar", **overrides))
