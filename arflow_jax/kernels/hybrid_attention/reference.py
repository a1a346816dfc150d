"""Hybrid attention written as its equations: one image after another, float32.

Slow and plain on purpose: every other implementation is tested against it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def hybrid_attention(
  q: Float[Array, "B T HD"],
  k: Float[Array, "B T HD"],
  v: Float[Array, "B T HD"],
  log_gate: Float[Array, "B T H"],
  state: Float[Array, "B H D D"] | None = None,
  *,
  num_chunks: int,
) -> tuple[Float[Array, "B T HD"], Float[Array, "B H D D"]]:
  """See `api.hybrid_attention`."""
  batch, length, width = q.shape
  heads = log_gate.shape[-1]
  tokens, head = length // num_chunks, width // heads

  def by_head(x):  # [B, T, H*D] -> [S, B, H, N, D]
    x = x.astype(jnp.float32).reshape(batch, num_chunks, tokens, heads, -1)
    return x.transpose(1, 0, 3, 2, 4)

  if state is None:
    state = jnp.zeros((batch, heads, head, head), jnp.float32)
  outs = []
  with jax.default_matmul_precision("highest"):
    for q_s, k_s, v_s, g_s in zip(*map(by_head, (q, k, v, log_gate))):
      g_s = g_s[..., 0]
      k_s = k_s * head**-0.5
      inner = jax.nn.softmax(q_s @ k_s.mT, axis=-1) @ v_s
      cross = (jnp.exp(jnp.cumsum(g_s, -1))[..., None] * q_s) @ state
      decay = jnp.exp(jnp.mean(g_s, -1))[..., None, None]
      state = decay * state + k_s.mT @ v_s
      outs.append(inner + cross)
  out = jnp.stack(outs, 1).transpose(0, 1, 3, 2, 4).reshape(q.shape)
  return out.astype(v.dtype), state
