"""FlowAR's flow head: the velocity of whole scales, given their semantics.

One small transformer serves all scales; a scale attends to itself alone. Each
token is modulated by its own condition (Spatial-adaLN, arXiv 2412.15205). There
are two published forms: attention and MLP (S), or with cross-attention to the
conditions between them (L, H). Noise levels run as published here: tau = 0 is
data, tau = 1 is noise, and the head answers noise - data.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from arflow_jax.flowar.layers import (
  GatedFeedForward,
  RMSNorm,
  modulated,
)
from arflow_jax.nn import attention, layers, rope, stack

# As published, whatever the transformer has.
_HEAD = 64  # features of an attention head
_MLP_RATIO = 4.0


class Context(NamedTuple):
  """What the head needs to know of the conditions, computed once a scale.

  Attributes:
    tokens: the condition of each token, in the head's width.
    cross: keys and values of each block's cross-attention, two arrays
      `[blocks, B, n, H, D]`, or None.
  """

  tokens: Float[Array, "B n F"]
  cross: Any

  def rows(self, count: int) -> "Context":
    """That of the first `count` images."""
    cross = jax.tree.map(lambda part: part[:, :count], self.cross)
    return Context(self.tokens[:count], cross)


class SelfAttention(nnx.Module):
  """Attention of every scale to itself, with rotary embedding."""

  def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    kwargs = dict(dtype=dtype, rngs=rngs)
    heads = width // _HEAD
    self.qkv = attention.to_heads(
      width, heads, _HEAD, parts=3, use_bias=False, **kwargs
    )
    self.proj = attention.from_heads(heads, _HEAD, width, **kwargs)

  def __call__(
    self, x: Float[Array, "B n F"], table: rope.Table, lengths: tuple[int, ...]
  ) -> Float[Array, "B n F"]:
    q, k, v = attention.rotated(self.qkv(x), table)
    return self.proj(_by_scale(q, k, v, lengths))


class CrossAttention(nnx.Module):
  """Attention of every scale to its own conditions."""

  def __init__(
    self, width: int, context: int, *, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.query_norm = RMSNorm(width)
    self.context_norm = RMSNorm(context)
    heads = width // _HEAD
    self.q = attention.to_heads(width, heads, _HEAD, use_bias=False, **kwargs)
    self.kv = attention.to_heads(
      context, heads, _HEAD, parts=2, use_bias=False, **kwargs
    )
    self.proj = attention.from_heads(heads, _HEAD, width, **kwargs)

  def keys_and_values(
    self, z: Float[Array, "B n W"], table: rope.Table
  ) -> tuple[Float[Array, "B n H D"], Float[Array, "B n H D"]]:
    """Keys and values of the conditions; they do not change with time."""
    kv = self.kv(self.context_norm(z))
    return rope.rotate(kv[:, :, 0], table), kv[:, :, 1]

  def __call__(
    self,
    x: Float[Array, "B n F"],
    kv: tuple[Float[Array, "B n H D"], Float[Array, "B n H D"]],
    table: rope.Table,
    lengths: tuple[int, ...],
  ) -> Float[Array, "B n F"]:
    q = self.q(self.query_norm(x))
    return self.proj(_by_scale(rope.rotate(q, table), *kv, lengths))


def _by_scale(q, k, v, lengths):
  """Attention inside each scale."""
  cuts = np.cumsum(lengths)[:-1]
  parts = [jnp.split(x, cuts, axis=1) for x in (q, k, v)]
  scales = [attention.attend(*scale) for scale in zip(*parts)]
  return jnp.concatenate(scales, axis=1)


class Block(nnx.Module):
  """One block of the head, in either published form."""

  def __init__(
    self,
    width: int,
    context: int,
    cross: bool,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    kwargs = dict(dtype=dtype, rngs=rngs)
    parts = 3 if cross else 6
    self.modulation = layers.linear(
      width, parts * width, (None, "embed"), **kwargs
    )
    self.attention = SelfAttention(width, **kwargs)
    self.cross = CrossAttention(width, context, **kwargs) if cross else None
    if cross:
      self.time_modulation = layers.linear(
        width, 3 * width, (None, "embed"), **kwargs
      )
    self.mlp = GatedFeedForward(width, _MLP_RATIO, **kwargs)
    self._dtype = dtype

  def __call__(
    self,
    x: Float[Array, "B n F"],
    time: Float[Array, "B G F"],
    condition: Float[Array, "B n F"],
    cross: Any,
    table: rope.Table,
    lengths: tuple[int, ...],
  ) -> Float[Array, "B n F"]:
    """`time` is one vector per scale, `condition` has it added per token."""
    mod = self.modulation(jax.nn.silu(condition).astype(self._dtype))
    if self.cross:
      per_scale = self.time_modulation(jax.nn.silu(time).astype(self._dtype))
      gate1, scale1, shift1 = (
        _per_token(part, lengths) for part in jnp.split(per_scale, 3, axis=-1)
      )
      gate2, scale2, shift2 = jnp.split(mod, 3, axis=-1)
    else:
      gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(mod, 6, axis=-1)
    u = modulated(x, shift1, scale1, self._dtype)
    x = x + gate1 * self.attention(u, table, lengths)
    if self.cross:
      x = x + self.cross(x.astype(self._dtype), cross, table, lengths)
    return x + gate2 * self.mlp(modulated(x, shift2, scale2, self._dtype))


def _per_token(x, lengths):
  """One vector per scale to one per token; a single scale broadcasts."""
  if len(lengths) == 1:
    return x
  return jnp.take(x, np.repeat(np.arange(len(lengths)), lengths), axis=1)


class FlowHead(nnx.Module):
  """Noisy tokens of one or more scales to the direction noise - data."""

  def __init__(
    self,
    features: int,
    context: int,
    width: int,
    depth: int,
    cross: bool,
    *,
    stretch: float,
    remat: str,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.time_embedding = layers.TimeEmbedding(
      width, rngs=rngs, init=layers.xavier
    )
    self.condition_proj = layers.linear(
      context, width, (None, "embed"), **kwargs
    )
    self.input_proj = layers.linear(features, width, (None, "embed"), **kwargs)
    self.blocks = stack.build(
      lambda rngs: Block(width, context, cross, dtype=dtype, rngs=rngs),
      depth,
      rngs,
    )
    self.final_modulation = layers.linear(
      width, 2 * width, (None, "embed"), **kwargs
    )
    self.final_linear = layers.linear(
      width, features, ("embed", None), result=jnp.float32, **kwargs
    )
    self._cross, self._stretch = cross, stretch
    self._remat, self._dtype = remat, dtype

  def context(
    self, z: Float[Array, "B n W"], sides: tuple[int, ...]
  ) -> Context:
    """Everything that depends on the conditions alone.

    Args:
      z: the transformer's answer for the tokens of some scales.
      sides: sides of these scales, in tokens.
    """
    tokens = self.condition_proj(z.astype(self._dtype)).astype(jnp.float32)
    if not self._cross:
      return Context(tokens, None)
    table = rope.table(sides, _HEAD, self._stretch)

    def step(block, carry, _):
      return carry, block.cross.keys_and_values(z.astype(self._dtype), table)

    return Context(tokens, stack.walk(self.blocks, step, None)[1])

  def __call__(
    self,
    x: Float[Array, "B n P"],
    levels: Float[Array, "B G"],
    context: Context,
    sides: tuple[int, ...],
  ) -> Float[Array, "B n P"]:
    """The direction noise - data at x, float32.

    Args:
      x: noisy tokens of G scales, one scale after another.
      levels: integer noise levels trunc(1000 tau), one per image and scale.
      context: what `context` made of these scales' conditions.
      sides: sides of the scales, in tokens.
    """
    lengths = tuple(side * side for side in sides)
    table = rope.table(sides, _HEAD, self._stretch)
    time = self.time_embedding(levels)
    condition = context.tokens + _per_token(time, lengths)
    h = self.input_proj(x.astype(self._dtype)).astype(jnp.float32)

    def step(block, h, cross):
      return block(h, time, condition, cross, table, lengths), None

    h, _ = stack.walk(self.blocks, step, h, context.cross, remat=self._remat)
    mod = self.final_modulation(jax.nn.silu(condition).astype(self._dtype))
    shift, scale = jnp.split(mod, 2, axis=-1)
    return self.final_linear(modulated(h, shift, scale, self._dtype))
