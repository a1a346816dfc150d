"""Published FlowAR weights in and out: exact round trips, what is refused."""

import jax
import numpy as np
import pytest
from flax import nnx

from arflow_jax.errors import ConfigError
from arflow_jax.flowar import weights
from arflow_jax.flowar.layers import hidden_features
from arflow_jax.flowar.network import ModelConfig
from tests.conftest import parity_files
from tests.flowar.helpers import (
  published_network,
  published_weights,
  random_network,
)


@pytest.mark.parametrize(
  "path", parity_files("flowar_train*") + parity_files("flowar_sample*")
)
def test_a_published_state_dict_comes_back_exactly(path, load_parity):
  z = load_parity(path)
  state_dict, made = z.params(), z.meta["constructor"]
  network, config = published_network(state_dict, patch_size=made["patch_size"])
  assert config.image_size == made["img_size"] // made["vae_stride"]
  assert config.channels == made["vae_embed_dim"]
  assert config.scales == tuple(made["scale"])
  assert config.width == made["encoder_embed_dim"]
  assert config.encoder_depth == made["encoder_depth"]
  assert config.decoder_depth == made["decoder_depth"]
  assert config.num_heads == made["encoder_num_heads"]
  # Several ratios may round to the same features; the simplest is told.
  features = hidden_features(config.width, config.mlp_ratio)
  assert features == hidden_features(config.width, made["mlp_ratio"])
  assert config.head_width == made["diffloss_w"]
  assert config.head_depth == made["diffloss_d"]
  assert config.cross_attention == made["cross"]
  # The published table has 1001 rows, whatever the number of classes.
  assert config.num_classes == len(state_dict["class_emb.weight"]) - 1
  assert config.num_classes >= made["class_num"]
  back = published_weights(network)
  assert back.keys() == state_dict.keys()
  for name, value in state_dict.items():
    if name.endswith("freqs"):  # computed, not stored
      np.testing.assert_allclose(back[name], value, rtol=1e-6)
    else:
      np.testing.assert_array_equal(back[name], value, err_msg=name)


def _published(cross, **change):
  sizes = dict(image_size=8, channels=3, patch_size=2, scales=(2, 4))
  sizes |= dict(width=32, encoder_depth=2, decoder_depth=1, num_heads=4)
  sizes |= dict(head_width=64, head_depth=2, num_classes=5)
  config = ModelConfig(cross_attention=cross, **sizes | change)
  return config, random_network(config)


@pytest.mark.parametrize("cross", [False, True])
def test_our_parameters_come_back_exactly(cross):
  config, network = _published(cross)
  state_dict = published_weights(network)
  back, found = published_network(state_dict, patch_size=2)
  assert found == config
  ours, theirs = (nnx.to_pure_dict(nnx.state(n)) for n in (network, back))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  # Without the buffers, what they told must be said.
  bare = {
    name: value
    for name, value in state_dict.items()
    if name != "mask" and not name.endswith("freqs")
  }
  with pytest.raises(ConfigError, match="give num_heads"):
    weights.from_published(bare, patch_size=2)
  _, found = published_network(bare, patch_size=2, num_heads=4)
  assert found == config
  for patch_size in (5, 0, -2):
    with pytest.raises(ConfigError, match=f"patch_size={patch_size}:"):
      weights.from_published(state_dict, patch_size=patch_size)
  name = "encoder_blocks.0.attn.rope.freqs"
  for frequencies in (np.zeros(()), np.zeros(9)):
    with pytest.raises(ConfigError, match=f"{name} has shape"):
      weights.from_published(state_dict | {name: frequencies}, patch_size=2)


def test_every_fault_is_named():
  _, network = _published(True)
  state_dict = published_weights(network)
  del state_dict["flownet.res_blocks.1.crossattn.kv.weight"]
  state_dict["mask"] = np.zeros((1, 1, 3, 3))
  state_dict["encoder_blocks.0.attn.q.weight"] = np.zeros(1)
  with pytest.raises(ConfigError) as caught:
    weights.from_published(state_dict, patch_size=2)
  message = str(caught.value)
  assert "missing: flownet.res_blocks.1.crossattn.kv.weight;" in message
  assert "unexpected: encoder_blocks.0.attn.q.weight;" in message
  assert "misshapen: mask (1, 1, 3, 3) instead of (1, 1, 20, 20)" in message


def test_tokens_that_fit_no_doubling_scales_are_asked_about():
  _, network = _published(False)
  state_dict = published_weights(network)
  for name in ("encoder", "decoder", "diffusion"):
    state_dict[f"{name}_pos_embed_learned"] = np.zeros((1, 22, 32), "float32")
  with pytest.raises(ConfigError, match=r"22 tokens .* give scales"):
    weights.from_published(state_dict, patch_size=2)


def test_something_else_is_refused_at_once():
  with pytest.raises(ConfigError, match=r"lack class_emb.*'epoch', 'model'"):
    weights.from_published({"model": {}, "epoch": 3})
