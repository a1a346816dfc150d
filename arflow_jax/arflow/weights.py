"""Published ARFlow weights to a network of ours, and back.

The published code keeps a PyTorch state dict: linear weights are (out, in), the
patch embedding is a convolution over (channel, row, column), blocks are counted
in the name, and the fixed position table is stored along.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from arflow_jax.arflow.network import ARFlow, ModelConfig, hidden_features
from arflow_jax.errors import ConfigError
from arflow_jax.nn import patches, published
from arflow_jax.nn.functional import Blueprint, Params


def _rows(config: ModelConfig) -> list[published.Row]:
  """Our parameters and the published names."""
  row, linear = published.Row, published.linear
  convolution = published.patch_convolution(config.patch_size, config.channels)
  attention, theirs = "blocks.attention.", "blocks.{}.attn."
  return [
    row("patch_embedding.kernel", "x_embedder.proj.weight", convolution),
    row("patch_embedding.bias", "x_embedder.proj.bias"),
    row("label_embedding.table", "y_embedder.embedding_table.weight"),
    *linear("time_embedding.fc1", "t_embedder.mlp.0"),
    *linear("time_embedding.fc2", "t_embedder.mlp.2"),
    *linear(attention + "q_proj", theirs + "q_proj", bias=False),
    *linear(attention + "k_proj", theirs + "k_proj", bias=False),
    *linear(attention + "v_proj", theirs + "v_proj", bias=False),
    *linear(attention + "gate_proj", theirs + "g_proj", bias=False),
    *linear(attention + "decay_proj", theirs + "gt_proj", bias=False),
    *linear(attention + "out_proj", theirs + "out_proj", bias=False, inputs=2),
    *linear("blocks.mlp.fc1", "blocks.{}.mlp.fc1"),
    *linear("blocks.mlp.fc2", "blocks.{}.mlp.fc2"),
    *linear("blocks.modulation", "blocks.{}.adaLN_modulation.1"),
    *linear("final_modulation", "final_layer.adaLN_modulation.1"),
    *linear("final_linear", "final_layer.linear"),
  ]


def from_published(
  state_dict: Mapping[str, Any], *, image_size: int | None = None
) -> tuple[dict[str, Any], Params]:
  """Published weights as ours, and the sizes inferred from them.

  Args:
    state_dict: arrays (NumPy, or anything NumPy can read) by published name.
      Of a training checkpoint, pass its `ema` entry.
    image_size: side of the (latent) images; needed only where the position
      table `pos_embed` is not among the weights.

  Returns:
    What the weights tell of the config's `model` group, and float32 parameters.

  Raises:
    ConfigError: names that are missing, unexpected or misshapen, a position
      table of another network, or an image size that is not known.
  """
  model = _infer(state_dict, image_size)
  config = ModelConfig(**model)
  blueprint = Blueprint(lambda rngs: ARFlow(config, rngs=rngs))
  abstract = jax.eval_shape(blueprint.init, jax.random.key(0))
  buffers = {}
  if "pos_embed" in state_dict:
    buffers["pos_embed"] = (1, config.side**2, config.width)
  params = published.restore(state_dict, _rows(config), abstract, buffers)
  if buffers:
    table = patches.sincos_table(config.side, config.width)
    error = np.abs(np.asarray(state_dict["pos_embed"])[0] - table).max()
    if not error < 5e-3:  # half precision passes, another order does not
      raise ConfigError(
        f"pos_embed differs by {error:.3g} from the sine-cosine table that"
        " these networks are built with: not an ARFlow of this layout"
      )
  return model, params


def to_published(
  config: ModelConfig, params: Params
) -> dict[str, Float[np.ndarray, "..."]]:
  """The exact inverse of `from_published`: a state dict of float32 arrays."""
  named = published.export(params, _rows(config))
  table = patches.sincos_table(config.side, config.width)
  return jax.device_get({"pos_embed": table[None]} | named)


def _infer(
  state_dict: Mapping[str, Any], image_size: int | None
) -> dict[str, Any]:
  """Sizes from shapes; only a few arrays are looked at, none is trusted yet."""
  ranks = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.attn.gt_proj.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
  }
  sizes = published.sizes(state_dict, ranks)
  width, channels, patch, _ = sizes["x_embedder.proj.weight"]
  if "pos_embed" in state_dict:
    tokens = published.sizes(state_dict, {"pos_embed": 3})["pos_embed"][1]
    stored = max(math.isqrt(tokens), 1) * patch
    if image_size not in (None, stored):
      raise ConfigError(
        f"image_size={image_size}, but pos_embed is that of {stored}"
      )
    image_size = stored
  if image_size is None:
    raise ConfigError(
      "published weights without pos_embed do not tell the image size; give"
      " image_size"
    )
  outputs = sizes["final_layer.linear.weight"][0]
  ratio = published.simplest_ratio(
    sizes["blocks.0.mlp.fc1.weight"][0],
    lambda ratio: hidden_features(width, ratio),
  )
  return dict(
    image_size=image_size,
    channels=channels,
    patch_size=patch,
    width=width,
    depth=published.count_layers(state_dict, "blocks.{}.attn.gt_proj.weight"),
    num_heads=sizes["blocks.0.attn.gt_proj.weight"][0],
    num_classes=sizes["y_embedder.embedding_table.weight"][0] - 1,
    mlp_ratio=ratio,
    learn_sigma=outputs == 2 * channels * patch**2,
  )
