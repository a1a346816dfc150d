"""The Pallas kernels for TPUs as one differentiable operator.

The kernels take the two factors that come from the gates, not the gates: JAX
differentiates those itself, and they are a 1/D of the bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arflow_jax.kernels import kept
from arflow_jax.kernels.hybrid_attention.pallas_tpu.backward import backward
from arflow_jax.kernels.hybrid_attention.pallas_tpu.forward import forward
from arflow_jax.kernels.hybrid_attention.pallas_tpu.plan import Plan


def hybrid_attention(
  q: Float[Array, "B T HD"],
  k: Float[Array, "B T HD"],
  v: Float[Array, "B T HD"],
  log_gate: Float[Array, "B T H"],
  state: Float[Array, "B ..."] | None = None,
  output_gate: Float[Array, "B T HD"] | None = None,
  scales: Float[Array, "B 3 T"] | None = None,
  *,
  num_chunks: int,
  packed: bool = False,
  interpret=False,
) -> tuple[Float[Array, "B T HD"], Float[Array, "B ..."]]:
  """See `api.hybrid_attention`; products in the type of q, sums in float32.

  Args:
    output_gate: see there.
    scales: factors of each token of q, k and v.
    packed: the state is `Arrays.memory`, in and out, and not [B, H, D, D].
    interpret: of `pallas_call`: True or `pltpu.InterpretParams` run the kernels
      on any machine, slowly.
  """
  batch, length, width = q.shape
  heads = log_gate.shape[-1]
  plan = Plan(
    batch,
    num_chunks,
    length // num_chunks,
    heads,
    width // heads,
    q.dtype,
    gated=output_gate is not None,
    stateful=state is not None,
  )
  g = log_gate.reshape(batch, num_chunks, plan.tokens, heads)
  # An inclusive cumulative sum as a triangular product, heads before tokens.
  triangle = jnp.tril(jnp.ones((plan.tokens, plan.tokens), jnp.float32))
  read = jnp.exp(jnp.einsum("nm,bsmh->bshn", triangle, g, precision="highest"))
  decay = jnp.repeat(jnp.exp(g.mean(2)), plan.head, axis=-1)[:, :, None]
  memory = state if packed or state is None else _pack(state, plan)
  if scales is None:
    scales = jnp.ones((batch, 3, length), jnp.float32)
  scales = scales.reshape(batch, 3, num_chunks, -1).swapaxes(1, 2)
  out, final = _attend(
    plan, interpret, q, k, v, scales, read, decay, output_gate, memory
  )
  return out, final if packed else _unpack(final, plan)


def _pack(state, plan):
  """[B, H, D, D] with [d, e] to [B, groups, D, lanes] with [e, (h, d)]."""
  batch, _, head, _ = state.shape
  state = state.reshape(batch, plan.groups, plan.per_group, head, head)
  return state.transpose(0, 1, 4, 2, 3).reshape(plan.arrays.memory.shape)


def _unpack(memory, plan):
  batch, head = plan.batch, plan.head
  memory = memory.reshape(batch, plan.groups, head, plan.per_group, head)
  return memory.transpose(0, 1, 3, 4, 2).reshape(batch, -1, head, head)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan, interpret, *operands):
  return tuple(forward(plan, *operands, save=False, interpret=interpret))


def _forward(plan, interpret, *operands):
  out, final, *saved = kept.keep(
    forward(plan, *operands, save=True, interpret=interpret), kept.ATTENTION
  )
  *operands, _ = operands  # no gradient needs the initial memory
  return (out, final), ([x for x in operands if x is not None], saved)


def _backward(plan, interpret, residuals, cotangents):
  grads = backward(plan, *residuals, *cotangents, interpret=interpret)
  if not plan.stateful:
    grads.append(None)
  if not plan.gated:
    grads.insert(6, None)
  return tuple(grads)


_attend.defvjp(_forward, _backward)
