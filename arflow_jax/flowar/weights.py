"""Published FlowAR weights to a network of ours, and back.

The state dict also holds the attention mask and the rotary frequencies: their
shapes are checked and tell sizes, their values are made anew.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from arflow_jax.errors import ConfigError
from arflow_jax.flowar.layers import hidden_features
from arflow_jax.flowar.network import FlowAR, ModelConfig
from arflow_jax.nn import published
from arflow_jax.nn.functional import Blueprint, Params

_LEADING_ONE = published.Layout(lambda a: a[None], lambda a: a[0])


def _gated(ours: str, theirs: str) -> list[published.Row]:
  return [
    *published.linear(ours + ".gate", theirs + ".fc1_g"),
    *published.linear(ours + ".value", theirs + ".fc1_x"),
    *published.linear(ours + ".fc2", theirs + ".fc2"),
  ]


def _rows(config: ModelConfig) -> list[published.Row]:
  """Our parameters and the published names."""
  row, linear = published.Row, published.linear
  rows = [
    row("label_embedding.table", "class_emb.weight"),
    *linear("token_proj", "z_proj"),
    row("token_norm.scale", "z_proj_ln.weight"),
    row("encoder_norm.scale", "encoder_norm.weight"),
    row("decoder_norm.scale", "decoder_norm.weight"),
    *linear("decoder_proj", "decoder_embed"),
  ]
  for ours, theirs in (
    ("encoder", "encoder"),
    ("decoder", "decoder"),
    ("condition", "diffusion"),
  ):
    name = theirs + "_pos_embed_learned"
    rows.append(row(ours + "_positions", name, _LEADING_ONE))
  for half in ("encoder", "decoder"):
    blocks = half + "_blocks.{}."
    rows += [
      *linear(half + ".qkv", blocks + "attn.qkv"),
      *linear(half + ".proj", blocks + "attn.proj", inputs=2),
      *_gated(half + ".mlp", blocks + "mlp"),
      *linear(half + ".modulation", blocks + "ada_lin.1"),
    ]
  return rows + head_rows("head.", "flownet.", config.cross_attention)


def head_rows(ours: str, theirs: str, cross: bool) -> list[published.Row]:
  """The rows of the flow head alone, by the prefixes of their names.

  Args:
    ours: prefix of our paths.
    theirs: prefix of the published names.
    cross: whether it is the form with cross-attention.
  """
  row, linear = published.Row, published.linear
  block, blocks = ours + "blocks.", theirs + "res_blocks.{}."
  final = theirs + "final_layer."
  rows = [
    *linear(ours + "time_embedding.fc1", theirs + "time_embed.mlp.0"),
    *linear(ours + "time_embedding.fc2", theirs + "time_embed.mlp.2"),
    *linear(ours + "condition_proj", theirs + "cond_embed"),
    *linear(ours + "input_proj", theirs + "input_proj"),
    *linear(block + "attention.qkv", blocks + "attn.qkv", bias=False),
    *linear(block + "attention.proj", blocks + "attn.proj", inputs=2),
    *_gated(block + "mlp", blocks + "mlp"),
    *linear(ours + "final_linear", final + "linear"),
    *linear(ours + "final_modulation", final + "adaLN_modulation.1"),
  ]
  if not cross:
    return [*rows, *linear(block + "modulation", blocks + "ada_lin")]
  return [
    *rows,
    *linear(block + "time_modulation", blocks + "ada_lin_attn"),
    *linear(block + "modulation", blocks + "ada_lin_mlp"),
    row(block + "cross.query_norm.scale", blocks + "norm2_1.weight"),
    row(block + "cross.context_norm.scale", blocks + "norm2_2.weight"),
    *linear(block + "cross.q", blocks + "crossattn.q", bias=False),
    *linear(block + "cross.kv", blocks + "crossattn.kv", bias=False),
    *linear(block + "cross.proj", blocks + "crossattn.proj", inputs=2),
  ]


def _buffers(config: ModelConfig) -> dict[str, Float[np.ndarray, "..."]]:
  """The entries of the published state dict that are no parameters."""

  def frequencies(size):
    return (10000.0 ** -(np.arange(size // 4) * 4 / size)).astype(np.float32)

  head = config.width // config.num_heads
  ids = np.repeat(np.arange(len(config.scales)), config.pyramid.lengths)
  mask = np.where(ids[:, None] >= ids, 0, -np.inf).astype(np.float32)
  buffers = {"mask": mask[None, None]}
  for half in ("encoder", "decoder"):
    for i in range(getattr(config, half + "_depth")):
      buffers[f"{half}_blocks.{i}.attn.rope.freqs"] = frequencies(head)
  for i in range(config.head_depth):
    for name in ("attn", "crossattn") if config.cross_attention else ("attn",):
      buffers[f"flownet.res_blocks.{i}.{name}.rope.freqs"] = frequencies(64)
  return buffers


def from_published(
  state_dict: Mapping[str, Any],
  *,
  patch_size: int = 1,
  num_heads: int | None = None,
  scales: tuple[int, ...] | None = None,
  rope_stretch: float | None = None,
) -> tuple[dict[str, Any], Params]:
  """Published weights as ours, and the sizes inferred from them.

  Args:
    state_dict: arrays (NumPy, or anything NumPy can read) by published name.
      Of a training checkpoint, pass its `model_ema` entry.
    patch_size: pixels along a token, 1 in the published networks; no shape
      tells it.
    num_heads: needed only where the rotary frequencies are not there.
    scales: needed only if not doubling sides fit the number of tokens.
    rope_stretch: range of the rotary positions. No shape tells it, and no
      parameter depends on it: it is returned only where it is given.

  Returns:
    What the weights tell of the config's `model` group, and float32 parameters.

  Raises:
    ConfigError: names that are missing, unexpected or misshapen, or sizes that
      cannot be told.
  """
  model = _infer(state_dict, patch_size, num_heads, scales)
  if rope_stretch is not None:
    model["rope_stretch"] = rope_stretch
  config = ModelConfig(**model)
  blueprint = Blueprint(lambda rngs: FlowAR(config, rngs=rngs))
  abstract = jax.eval_shape(blueprint.init, jax.random.key(0))
  buffers = {
    name: value.shape
    for name, value in _buffers(config).items()
    if name in state_dict
  }
  params = published.restore(state_dict, _rows(config), abstract, buffers)
  return model, params


def to_published(
  config: ModelConfig, params: Params
) -> dict[str, Float[np.ndarray, "..."]]:
  """The exact inverse of `from_published`: a state dict of float32 arrays."""
  named = published.export(params, _rows(config))
  return jax.device_get(named) | _buffers(config)


def _infer(state_dict, patch_size, num_heads, scales):
  """Sizes from shapes; only a few arrays are looked at, none is trusted yet."""
  ranks = {
    "class_emb.weight": 2,
    "z_proj.weight": 2,
    "encoder_pos_embed_learned": 3,
    "encoder_blocks.0.mlp.fc1_g.weight": 2,
    "flownet.input_proj.weight": 2,
  }
  sizes = published.sizes(state_dict, ranks)
  classes, width = sizes["class_emb.weight"]
  features = sizes["z_proj.weight"][1]
  if patch_size < 1 or features % patch_size**2:
    raise ConfigError(
      f"patch_size={patch_size}: z_proj.weight has {features} inputs, which are"
      " no whole number of channels; give the patch size of these weights"
    )
  if num_heads is None:
    name = "encoder_blocks.0.attn.rope.freqs"
    quarters = np.shape(state_dict.get(name))
    if len(quarters) != 1 or not quarters[0] or width % (4 * quarters[0]):
      raise ConfigError(
        f"published weights do not tell the number of heads: {name} has shape"
        f" {quarters} where a quarter of a head is wanted; give num_heads"
      )
    num_heads = width // (4 * quarters[0])
  tokens = sizes["encoder_pos_embed_learned"][1]
  scales = scales or _doubling_scales(tokens)
  block, head = "{}_blocks.{{}}.attn.qkv.weight", "flownet.res_blocks.{}"
  ratio = published.simplest_ratio(
    sizes["encoder_blocks.0.mlp.fc1_g.weight"][0],
    lambda ratio: hidden_features(width, ratio),
  )
  return dict(
    image_size=scales[-1] * patch_size,
    channels=features // patch_size**2,
    patch_size=patch_size,
    scales=tuple(scales),
    width=width,
    encoder_depth=published.count_layers(state_dict, block.format("encoder")),
    decoder_depth=published.count_layers(state_dict, block.format("decoder")),
    num_heads=num_heads,
    mlp_ratio=ratio,
    head_width=sizes["flownet.input_proj.weight"][0],
    head_depth=published.count_layers(state_dict, head + ".attn.qkv.weight"),
    cross_attention=any(".crossattn." in name for name in state_dict),
    num_classes=classes - 1,
  )


def _doubling_scales(tokens: int) -> tuple[int, ...]:
  """The doubling sides whose squares add up to `tokens`: s^2 (4^K - 1) / 3.

  There is one answer at most: no two of these factors differ by a square.
  """
  for count in range(1, 12):
    factor = (4**count - 1) // 3
    first = math.isqrt(tokens // factor)
    if first and first**2 * factor == tokens:
      return tuple(first * 2**k for k in range(count))
  raise ConfigError(
    f"{tokens} tokens of encoder_pos_embed_learned are no doubling scales; give"
    " scales"
  )
