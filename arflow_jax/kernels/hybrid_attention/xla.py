"""Hybrid attention as batched matrix products that XLA compiles well anywhere.

All images of a sequence are computed at once; only the decayed sum of their
k^T v goes from image to image, element by element.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Sequences up to this long need no loop in the compiled program.
_UNROLL = 8


def hybrid_attention(
  q: Float[Array, "B T HD"],
  k: Float[Array, "B T HD"],
  v: Float[Array, "B T HD"],
  log_gate: Float[Array, "B T H"],
  state: Float[Array, "B H D D"] | None = None,
  *,
  num_chunks: int,
  cudnn: bool = False,
) -> tuple[Float[Array, "B T HD"], Float[Array, "B H D D"]]:
  """See `api.hybrid_attention`; products in the type of q, sums in float32.

  Args:
    cudnn: attention inside images by cuDNN's fused kernel, which never writes
      its scores.
  """
  batch, length, width = q.shape
  heads = log_gate.shape[-1]
  tokens, head = length // num_chunks, width // heads
  precision = "highest" if q.dtype == jnp.float32 else None

  def product(spec, a, b):
    return jnp.einsum(
      spec, a, b, precision=precision, preferred_element_type=jnp.float32
    )

  q, k, v = (
    x.reshape(batch, num_chunks, tokens, heads, head) for x in (q, k, v)
  )
  k = k * jnp.asarray(head**-0.5, k.dtype)
  g = log_gate.reshape(batch, num_chunks, tokens, heads)

  if cudnn:
    images = [x.reshape(-1, tokens, heads, head) for x in (q, k, v)]
    out = jax.nn.dot_product_attention(
      *images, scale=1.0, implementation="cudnn"
    )
    out = out.reshape(q.shape).astype(jnp.float32)
  else:
    scores = product("bsnhd,bsmhd->bshnm", q, k)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = product("bshnm,bsmhd->bsnhd", weights, v)

  # An inclusive cumulative sum as a triangular product: a matrix unit does it
  # at once, and its gradient is the transposed triangle.
  triangle = jnp.tril(jnp.ones((tokens, tokens), jnp.float32))
  read_decay = jnp.exp(
    jnp.einsum("nm,bsmh->bsnh", triangle, g, precision="highest")
  )
  read = (q.astype(jnp.float32) * read_decay[..., None]).astype(q.dtype)
  kv = product("bsnhd,bsnhe->sbhde", k, v)
  if state is None:
    state = jnp.zeros_like(kv[0])
  memories, state = _recur(kv, jnp.exp(g.mean(2)), state)
  out += product("bsnhd,sbhde->bsnhe", read, memories.astype(q.dtype))
  return out.reshape(batch, length, width).astype(v.dtype), state


def _recur(
  kv: Float[Array, "S B H D D"],
  decay: Float[Array, "B S H"],
  state: Float[Array, "B H D D"],
) -> tuple[Float[Array, "S B H D D"], Float[Array, "B H D D"]]:
  """Returns the memory that each image reads and the one after the last."""

  def step(memory, inputs):
    kv_s, decay_s = inputs
    return decay_s[..., None, None] * memory + kv_s, memory

  unroll = kv.shape[0] <= _UNROLL
  state, memories = jax.lax.scan(
    step, state, (kv, jnp.moveaxis(decay, 1, 0)), unroll=unroll
  )
  return memories, state
