"""Published weights in and out: exact round trips, and what is refused."""

import jax
import numpy as np
import pytest
from flax import nnx

from arflow_jax.arflow import weights
from arflow_jax.arflow.network import ModelConfig, hidden_features
from arflow_jax.errors import ConfigError
from tests.arflow.helpers import (
  GOLDEN,
  golden_state_dict,
  published_network,
  published_weights,
  random_network,
)
from tests.conftest import parity_files


def _state_dict():
  return golden_state_dict(np.random.RandomState(0))


@pytest.mark.parametrize(
  "path", parity_files("arflow_[rs]*") + parity_files("arflow_train*")
)
def test_a_published_state_dict_comes_back_exactly(path, load_parity):
  z = load_parity(path)
  state_dict = z.params()
  network, config = published_network(state_dict)
  made = z.meta["constructor"]
  assert config.image_size == made["input_size"]
  assert config.channels == made["in_channels"]
  assert config.patch_size == made["patch_size"]
  assert config.width == made["hidden_size"]
  assert config.depth == made["depth"]
  assert config.num_heads == made["num_heads"]
  # Several ratios may round to the same features; the simplest is told.
  features = hidden_features(config.width, config.mlp_ratio)
  assert features == hidden_features(config.width, made.get("mlp_ratio", 4.0))
  assert config.num_classes == made["num_classes"]
  assert config.learn_sigma == made["learn_sigma"]
  back = published_weights(network)
  assert back.keys() == state_dict.keys()
  for name, value in state_dict.items():
    if name == "pos_embed":  # computed, not stored
      np.testing.assert_allclose(back[name], value, atol=1e-6)
    else:
      np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_our_parameters_come_back_exactly(learn_sigma):
  config = ModelConfig(8, 3, 4, 16, 3, 2, 5, learn_sigma=learn_sigma)
  network = random_network(config)
  state_dict = published_weights(network)
  assert state_dict["x_embedder.proj.weight"].shape == (16, 3, 4, 4)
  back, found = published_network(state_dict)
  assert found == config
  ours, theirs = (nnx.to_pure_dict(nnx.state(n)) for n in (network, back))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_shapes_leave_open_is_asked_for():
  with pytest.raises(ConfigError, match="give image_size"):
    weights.from_published(_state_dict())
  network, config = published_network(_state_dict(), image_size=8)
  assert config == GOLDEN
  table = published_weights(network)["pos_embed"]
  _, found = published_network(_state_dict() | {"pos_embed": table})
  assert found == GOLDEN
  with pytest.raises(ConfigError, match=r"image_size=16.*that of 8"):
    weights.from_published(_state_dict() | {"pos_embed": table}, image_size=16)


def test_every_fault_is_named():
  state_dict = _state_dict()
  del state_dict["blocks.1.attn.q_proj.weight"]
  state_dict["blocks.0.attn.qkv.weight"] = np.zeros((1, 1), np.float32)
  state_dict["blocks.norm.weight"] = np.zeros(1, np.float32)
  state_dict["blocks.99.mlp.fc1.bias"] = None
  state_dict["blocks.0.mlp.fc1.bias"] = [0.0] * 7
  with pytest.raises(ConfigError) as caught:
    weights.from_published(state_dict, image_size=8)
  message = str(caught.value)
  assert "missing: blocks.1.attn.q_proj.weight;" in message
  unexpected = "blocks.0.attn.qkv.weight, blocks.99.mlp.fc1.bias,"
  assert f"unexpected: {unexpected} blocks.norm.weight;" in message
  assert "misshapen: blocks.0.mlp.fc1.bias (7,) instead of (512,)" in message


def test_another_position_table_is_refused():
  network, _ = published_network(_state_dict(), image_size=8)
  table = published_weights(network)["pos_embed"]
  rows_first = np.concatenate(np.split(table, 2, axis=-1)[::-1], axis=-1)
  with pytest.raises(ConfigError, match="pos_embed differs by"):
    weights.from_published(_state_dict() | {"pos_embed": rows_first})
  with pytest.raises(ConfigError, match="lack pos_embed of 3 axes"):
    weights.from_published(_state_dict() | {"pos_embed": []})
  half = table.astype(np.float16)
  weights.from_published(_state_dict() | {"pos_embed": half})
  with pytest.raises(ConfigError, match=r"misshapen: pos_embed \(1, 15, 128\)"):
    weights.from_published(_state_dict() | {"pos_embed": table[:, :15]})


def test_something_else_is_refused_at_once():
  checkpoint = {"model": _state_dict(), "ema": _state_dict(), "args": None}
  with pytest.raises(ConfigError, match=r"lack x_embedder.*'args', 'ema'"):
    weights.from_published(checkpoint)
