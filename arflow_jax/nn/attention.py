"""Attention whose projections give the heads an axis of their own.

Kernels are `[E, H, D]`, or `[E, parts, H, D]` where one product makes several
of query, key and value, and `[H, D, E]` on the way back. A mesh axis over
`heads` therefore splits whole heads, and never between query, key and value.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from arflow_jax.kernels import kept
from arflow_jax.nn import layers, rope


def to_heads(
  inputs: int, heads: int, size: int, *, parts: int | None = None, **kwargs: Any
) -> nnx.LinearGeneral:
  """The projection of tokens to heads.

  Args:
    inputs: E, features of a token.
    heads: H.
    size: D, features of a head.
    parts: how many of query, key and value it makes, if more than one; they
      are an axis before the heads.
    **kwargs: see `layers.linear`.
  """
  if parts is None:
    return layers.linear(
      inputs, (heads, size), ("embed", "heads", None), **kwargs
    )
  axes = ("embed", None, "heads", None)
  return layers.linear(inputs, (parts, heads, size), axes, **kwargs)


def from_heads(
  heads: int, size: int, outputs: int, **kwargs: Any
) -> nnx.LinearGeneral:
  """The projection of heads to tokens; `**kwargs` as in `layers.linear`."""
  axes = ("heads", None, "embed")
  return layers.linear((heads, size), outputs, axes, **kwargs)


def rotated(
  qkv: Float[Array, "B n 3 H D"], table: rope.Table
) -> tuple[
  Float[Array, "B n H D"], Float[Array, "B n H D"], Float[Array, "B n H D"]
]:
  """Query, key and value of one product, the first two rotated by `table`."""
  q, k, v = (qkv[:, :, i] for i in range(3))
  return rope.rotate(q, table), rope.rotate(k, table), v


def attend(
  q: Float[Array, "B n H D"],
  k: Float[Array, "B m H D"],
  v: Float[Array, "B m H D"],
  visible: Bool[np.ndarray, "n m"] | None = None,
  dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "B n H D"]:
  """Softmax attention, scores and softmax in float32.

  Args:
    q: queries.
    k: keys.
    v: values.
    visible: which keys a query sees; None stands for all.
    dropout: of the attention probabilities.
  """
  precision = "highest" if q.dtype == jnp.float32 else None
  kwargs = dict(precision=precision, preferred_element_type=jnp.float32)
  scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, **kwargs) * q.shape[-1] ** -0.5
  if visible is not None:
    scores = jnp.where(jnp.asarray(visible), scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1)
  if dropout:
    weights = dropout(weights)
  out = jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v.dtype), v, **kwargs)
  return kept.keep(out.astype(v.dtype), kept.ATTENTION)
