"""The FlowAR network (arXiv 2412.15205; sizes and layout as published).

A block-causal transformer reads the class and, for every scale, the scale below
it; its answer for a token is the condition from which the flow head draws that
token. Training feeds all scales at once under a mask; sampling feeds one scale
per call and passes a cache of keys and values along: the same code.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from arflow_jax import values
from arflow_jax.errors import ConfigError
from arflow_jax.flowar import pyramid
from arflow_jax.flowar.head import FlowHead
from arflow_jax.flowar.layers import (
  Dropout,
  GatedFeedForward,
  RMSNorm,
  hidden_features,
  modulated,
)
from arflow_jax.nn import attention, layers, rope, stack

# Keys and values of each layer, [L, B, m, H, D], of the encoder and decoder.
KeysAndValues = tuple[Float[Array, "_ B _ H D"], Float[Array, "_ B _ H D"]]
Cache = tuple[KeysAndValues, KeysAndValues]


RULES = layers.RULES | {
  "scales": values.each(values.whole(1, 256)),
  **dict.fromkeys(
    ("encoder_depth", "decoder_depth", "head_depth"), values.whole(1, 10_000)
  ),
  "head_width": values.SIZE,
  "cross_attention": values.switch,
  "dropout": values.PROBABILITY,
  "rope_stretch": values.real("(0, 1e6]"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that fixes the parameters of a `FlowAR` and how it computes.

  Attributes:
    image_size: side of the (latent) images; the last scale times the patch.
    channels: C, channels of the (latent) images.
    patch_size: side of a token in pixels, at every scale.
    scales: sides of the scales in tokens, each twice the one before.
    width: W, features of the transformer.
    encoder_depth: blocks of its first half.
    decoder_depth: blocks of its second half.
    num_heads: its heads; `width / num_heads` is a multiple of 4.
    head_width: F, features of the flow head, a multiple of 64.
    head_depth: blocks of the flow head.
    cross_attention: whether those blocks also attend to the conditions.
    num_classes: classes; label `num_classes` is the null class.
    mlp_ratio: 3/2 of the hidden features of the transformer's feed-forward
      layers over `width`; the flow head always has 4.
    dropout: of attention probabilities, attention results and both sides of
      the feed-forward's last layer, in the transformer, in training.
    rope_stretch: the range of positions that a scale of any side spans.
    dtype: type of the matrix products, "float32" or "bfloat16".
    remat: what the backward pass recomputes, a name in `nn.stack.REMAT`.
  """

  image_size: int
  channels: int
  patch_size: int
  scales: tuple[int, ...]
  width: int
  encoder_depth: int
  decoder_depth: int
  num_heads: int
  head_width: int
  head_depth: int
  cross_attention: bool
  num_classes: int
  mlp_ratio: float = 4.0
  dropout: float = 0.1
  rope_stretch: float = 16.0
  dtype: str = "float32"
  remat: str = "dots"

  def __post_init__(self):
    side = self.pyramid.side
    if side != self.image_size:
      raise ConfigError(
        f"model.scales={self.scales} end at a side of {side} pixels (patches"
        f" of {self.patch_size}), but model.image_size={self.image_size}"
      )
    if self.width % (4 * self.num_heads):
      raise ConfigError(
        f"model.width={self.width} must be a multiple of 4 x"
        f" model.num_heads={self.num_heads}: rotary embedding splits a head"
        " into quarters"
      )
    if self.head_width % 64:
      raise ConfigError(
        f"model.head_width={self.head_width} must be a multiple of 64, the size"
        " of an attention head there"
      )
    layers.check_mlp_ratio(
      self.mlp_ratio, hidden_features(self.width, self.mlp_ratio)
    )

  @property
  def pyramid(self) -> pyramid.Pyramid:
    """The scales and their resize operators."""
    return pyramid.Pyramid(self.scales, self.patch_size)

  @property
  def features(self) -> int:
    """P, numbers in a token."""
    return self.patch_size**2 * self.channels


class Block(nnx.Module):
  """Transformer block with adaLN from the class."""

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    width = config.width
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.modulation = layers.modulation(width, 6, rngs=rngs)
    heads, size = config.num_heads, width // config.num_heads
    self.qkv = attention.to_heads(width, heads, size, parts=3, **kwargs)
    self.proj = attention.from_heads(heads, size, width, **kwargs)
    self.mlp = GatedFeedForward(width, config.mlp_ratio, **kwargs)
    self._config, self._dtype = config, dtype

  def __call__(
    self,
    h: Float[Array, "B n W"],
    c: Float[Array, "B W"],
    table: rope.Table,
    visible: np.ndarray | None,
    cache: tuple[Array, Array] | None,
    keys: Key[Array, "B"] | None,
  ) -> tuple[Float[Array, "B n W"], tuple[Array, Array]]:
    """Returns the tokens and their own keys and values."""
    dropout = keys is not None and Dropout(self._config.dropout, keys)
    drop = dropout or (lambda x: x)
    mod = self.modulation(jax.nn.silu(c))[:, None]
    gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(mod, 6, axis=-1)
    qkv = self.qkv(modulated(h, shift1, scale1, self._dtype))
    q, k, v = attention.rotated(qkv, table)
    seen_k, seen_v = k, v
    if cache is not None:
      seen_k = jnp.concatenate([cache[0], k], axis=1)
      seen_v = jnp.concatenate([cache[1], v], axis=1)
    out = attention.attend(q, seen_k, seen_v, visible, dropout or None)
    h = h + gate1 * drop(self.proj(out))
    u = modulated(h, shift2, scale2, self._dtype)
    return h + gate2 * self.mlp(u, dropout or None), (k, v)


class FlowAR(nnx.Module):
  """Transformer and flow head."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    dtype = jnp.dtype(config.dtype)
    width, length = config.width, sum(config.pyramid.lengths)
    kwargs = dict(dtype=dtype, rngs=rngs)

    def positions():
      value = layers.normal(rngs.params(), (length, width), jnp.float32)
      return nnx.Param(value, axes=(None, "embed"))

    def block(rngs):
      return Block(config, dtype=dtype, rngs=rngs)

    self.label_embedding = layers.LabelEmbedding(
      config.num_classes, width, rngs=rngs
    )
    self.token_proj = layers.linear(
      config.features, width, (None, "embed"), **kwargs
    )
    self.token_norm = RMSNorm(width)
    self.encoder_positions = positions()
    self.encoder = stack.build(block, config.encoder_depth, rngs)
    self.encoder_norm = RMSNorm(width)
    self.decoder_proj = layers.linear(width, width, (None, "embed"), **kwargs)
    self.decoder_positions = positions()
    self.decoder = stack.build(block, config.decoder_depth, rngs)
    self.decoder_norm = RMSNorm(width)
    self.condition_positions = positions()
    self.head = FlowHead(
      config.features,
      width,
      config.head_width,
      config.head_depth,
      config.cross_attention,
      stretch=config.rope_stretch,
      remat=config.remat,
      **kwargs,
    )

  def conditions(
    self,
    labels: Int[Array, "B"],
    inputs: list[Float[Array, "B _ _ C"]],
    cache: Cache | None = None,
    *,
    first: int = 0,
    keys: Key[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B n W"], Cache]:
    """The condition of every token of some scales, and the cache after them.

    Args:
      labels: one class per image; `num_classes` is the null class.
      inputs: `Pyramid.next_input` of each scale; scale 0 has none, it reads the
        class.
      cache: what the call for the scales before returned; None before scale 0.
      first: index of the first scale of this call.
      keys: one key per image for dropout; None turns it off.

    Raises:
      ValueError: later scales without a cache, or the first with one.
    """
    if (first > 0) != (cache is not None):
      wanted = "the cache of the scales before" if first else "no cache"
      raise ValueError(f"first={first} needs {wanted}")
    config = self.config
    tokens, c = self._tokens(labels, inputs, first)
    last = first + len(inputs) + (first == 0)
    lengths = config.pyramid.lengths
    begin, end = sum(lengths[:first]), sum(lengths[:last])
    ids = np.repeat(np.arange(last), lengths[:last])
    visible = ids[begin:, None] >= ids[None]  # block-causal over scales
    table = rope.table(
      config.scales[first:last],
      config.width // config.num_heads,
      config.rope_stretch,
    )
    common = (c, table, None if visible.all() else visible)
    encoder_keys = decoder_keys = None
    if keys is not None:
      depth = config.encoder_depth + config.decoder_depth
      keys = jax.vmap(lambda key: jax.random.split(key, depth))(keys).T
      encoder_keys = keys[: config.encoder_depth]
      decoder_keys = keys[config.encoder_depth :]
    h = tokens + self.encoder_positions[begin:end]
    h = self.token_norm(h)
    seen = cache or (None, None)
    h, encoded = self._blocks(self.encoder, h, common, seen[0], encoder_keys)
    h = self.encoder_norm(h).astype(config.dtype)
    h = self.decoder_proj(h).astype(jnp.float32)
    h = h + self.decoder_positions[begin:end]
    h, decoded = self._blocks(self.decoder, h, common, seen[1], decoder_keys)
    z = self.decoder_norm(h) + self.condition_positions[begin:end]
    return z, (encoded, decoded)

  def _tokens(self, labels, inputs, first):
    c = self.label_embedding(labels)
    parts = []
    if first == 0:  # the published first scale is one token; any has the class
      parts.append(jnp.repeat(c[:, None], self.config.scales[0] ** 2, axis=1))
    if inputs:
      flat = [self.config.pyramid.tokens(x) for x in inputs]
      flat = jnp.concatenate(flat, axis=1).astype(self.config.dtype)
      parts.append(self.token_proj(flat).astype(jnp.float32))
    return jnp.concatenate(parts, axis=1), c

  def _blocks(self, blocks, h, common, cache, keys):
    def step(block, h, inputs):
      return block(h, *common, *inputs)

    h, new = stack.walk(blocks, step, h, (cache, keys), remat=self.config.remat)
    if cache is not None:
      new = tuple(jnp.concatenate(pair, axis=2) for pair in zip(cache, new))
    return h, new
