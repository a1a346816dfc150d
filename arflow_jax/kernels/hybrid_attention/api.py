"""The public hybrid-attention operator and its dispatch.

ARFlow (arXiv 2501.16085), section 3.3: tokens attend with softmax inside their
own image and read earlier images through a gated `D x D` state per head.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from arflow_jax.kernels.hybrid_attention import reference, xla

IMPLEMENTATIONS = {
  "reference": reference.hybrid_attention,
  "xla": xla.hybrid_attention,
}


def hybrid_attention(
  q: Float[Array, "B T HD"],
  k: Float[Array, "B T HD"],
  v: Float[Array, "B T HD"],
  log_gate: Float[Array, "B T H"],
  state: Float[Array, "B H D D"] | None = None,
  *,
  num_chunks: int,
  implementation: str | None = None,
) -> tuple[Float[Array, "B T HD"], Float[Array, "B H D D"]]:
  """Softmax attention inside each chunk plus a gated read of earlier chunks.

  With `S = num_chunks` images of `N = T / S` tokens, per head and image s:

      k_s    = k_s / sqrt(D)
      out_s  = softmax(q_s k_s^T) v_s + (exp(cumsum(g_s)) * q_s) M_s
      M_s+1  = exp(mean(g_s)) M_s + k_s^T v_s

  where `g = log_gate`, the cumulative sum is inclusive and runs over the tokens
  of the image, and `M_0` is `state`.

  Args:
    q: queries, heads packed: feature `h * D + d` belongs to head h.
    k: keys, packed likewise, not yet scaled.
    v: values, packed likewise.
    log_gate: float32 log decays, at most 0, one per token and head; the number
      of heads H is taken from it.
    state: float32 memory left by earlier chunks; None stands for zeros.
    num_chunks: S, the number of images that the T tokens hold.
    implementation: `reference` (plain float32, slow), `xla` (fast on every
      platform), or None for the best one known. A name never falls back.

  Returns:
    The output in the type of `v`, packed like the inputs, and the float32
    memory after the last chunk.

  Raises:
    ValueError: shapes that do not fit together, or an unknown implementation.
  """
  batch, length, width = q.shape
  heads = log_gate.shape[-1]
  if num_chunks < 1 or length % num_chunks:
    raise ValueError(
      f"num_chunks={num_chunks} does not divide the {length} tokens of q"
    )
  if width % heads:
    raise ValueError(
      f"log_gate has {heads} heads, which do not divide the width {width} of q"
    )
  if log_gate.dtype != jnp.float32:
    raise ValueError(f"log_gate must be float32, got {log_gate.dtype}")
  shapes = {"k": k.shape, "v": v.shape, "log_gate": log_gate.shape[:2]}
  wanted = {"k": q.shape, "v": q.shape, "log_gate": q.shape[:2]}
  head = width // heads
  if state is not None:
    shapes["state"], wanted["state"] = state.shape, (batch, heads, head, head)
  for name, shape in shapes.items():
    if shape != wanted[name]:
      raise ValueError(
        f"{name} has shape {shape}, expected {wanted[name]} for q of {q.shape}"
      )
  name = implementation or "xla"
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={name!r} is unknown; choose from"
      f" {sorted(IMPLEMENTATIONS)}"
    )
  return IMPLEMENTATIONS[name](q, k, v, log_gate, state, num_chunks=num_chunks)
