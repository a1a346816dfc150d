"""What every family promises: weights in and out, and stored configs."""

import importlib

import jax
import numpy as np
import pytest

from arflow_jax import branches
from arflow_jax.config import flatten
from arflow_jax.errors import ConfigError
from tests.tiny import random_params, tiny_config

FAMILIES = pytest.mark.parametrize(
  ("name", "other"),
  [("arflow", "imagenet256-xl2"), ("flowar", "imagenet256-l")],
)


def _abstract(branch):
  return jax.eval_shape(branch.init, jax.random.key(0))


@FAMILIES
@pytest.mark.parametrize("ratio", [2.5, 3.0, 4.0])
def test_published_weights_make_a_branch_of_their_shapes(name, other, ratio):
  branch = branches.build(tiny_config(name, model__mlp_ratio=ratio))
  params = random_params(_abstract(branch))
  state_dict = branch.to_published(params)
  model, back = branches.family(name).from_published(state_dict)
  assert model["mlp_ratio"] == ratio

  # Whatever size the config had, it now has that of the weights.
  config = importlib.import_module(f"configs.{name}").get_config(other)
  config.model.update(model)
  built = branches.build(config)
  shapes = jax.tree.map(lambda leaf: leaf.shape, _abstract(built))
  assert jax.tree.map(lambda leaf: leaf.shape, back) == shapes
  jax.tree.map(np.testing.assert_array_equal, back, params)
  again = built.to_published(back)
  assert again.keys() == state_dict.keys()
  for key, value in again.items():
    np.testing.assert_array_equal(value, state_dict[key], err_msg=key)


def test_what_no_shape_tells_of_a_flowar_is_given_or_stays():
  config = tiny_config("flowar", model__rope_stretch=5.0)
  config.model.update(patch_size=2, scales=(1, 2, 4), channels=3)
  branch = branches.build(config)
  params = random_params(_abstract(branch))
  model, back = branches.family("flowar").from_published(
    branch.to_published(params), patch_size=2
  )
  jax.tree.map(np.testing.assert_array_equal, back, params)
  config.model.update(model)
  assert branches.build(config).config == branch.config
  given = branches.family("flowar").from_published(
    branch.to_published(params), patch_size=2, rope_stretch=7.0
  )
  assert given[0]["rope_stretch"] == 7.0


@FAMILIES
def test_the_ratio_changes_the_feed_forward_alone(name, other):
  del other
  narrow, wide = (
    flatten(_abstract(branches.build(tiny_config(name, model__mlp_ratio=r))))
    for r in (2.0, 4.0)
  )
  changed = {key for key in wide if wide[key].shape != narrow[key].shape}
  # The flow head keeps its own.
  wanted = {k for k in wide if ".mlp." in k and not k.startswith("head.")}
  assert changed == {k for k in wanted if not k.endswith("fc2.bias")}


@FAMILIES
def test_added_keys_are_keys_of_the_config(name, other):
  """What completes a stored config must still be the way to write it."""
  config = importlib.import_module(f"configs.{name}").get_config(other)
  keys = flatten(config.to_dict())
  added = branches.family(name).added_keys
  assert added["model.mlp_ratio"] == 4.0
  assert added.keys() <= keys.keys()


def test_an_unknown_family_is_refused_by_name():
  with pytest.raises(
    ConfigError, match=r"branch='flwar'.*choose from .*flowar"
  ):
    branches.family("flwar")
