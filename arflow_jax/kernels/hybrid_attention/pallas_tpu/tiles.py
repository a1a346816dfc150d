"""What both kernels do with the lanes of a group and the packed memory."""

import jax
import jax.numpy as jnp

from arflow_jax.kernels.hybrid_attention.pallas_tpu.plan import Plan

EPSILON = 1e-6  # of the norm of each head's output
LOG2_E = 1.4426950408889634  # softmax by powers of two: one product less


def product(a: jax.Array, b: jax.Array, *, b_transposed: bool = False):
  """`a @ b` (or `a @ b.T`) in float32, whatever the default precision is."""
  full = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (1 if b_transposed else 0,)), ((), ())),
    precision="highest" if full else "default",
    preferred_element_type=jnp.float32,
  )


def sigmoid(x: jax.Array) -> jax.Array:
  """By the hyperbolic tangent: one instruction, where exp needs a division."""
  return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
  """x times a float32 factor, in the type of x."""
  return (x * factor).astype(x.dtype)


class Lanes:
  """The heads of a group, side by side in the lanes."""

  def __init__(self, plan: Plan):
    self.plan = plan
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, plan.lanes), 1)
    self._head = lane // plan.head

  def rows(self, head: int) -> slice:
    """The features of one head, where features are rows."""
    return slice(head * self.plan.head, (head + 1) * self.plan.head)

  def only(self, x: jax.Array, head: int) -> jax.Array:
    """x [rows, lanes] with the lanes of all other heads at zero."""
    if self.plan.per_group == 1:
      return x
    return jnp.where(self._head == head, x, jnp.zeros_like(x))

  def only_rows(self, x: jax.Array, head: int) -> jax.Array:
    """x [lanes, columns] with the rows of all other heads at zero."""
    parts = [jnp.zeros_like(x[self.rows(0)])] * self.plan.per_group
    parts[head] = x[self.rows(head)]
    return jnp.concatenate(parts)

  def across(self, row: jax.Array) -> jax.Array:
    """A row [1, N] of numbers per token as columns: [N, lanes]."""
    return jnp.broadcast_to(row, (self.plan.lanes, row.shape[1])).T

  def pack(self, full: jax.Array) -> jax.Array:
    """The diagonal D x D blocks of [lanes, lanes], as [D, lanes]."""
    packed = full[self.rows(0)]
    for head in range(1, self.plan.per_group):
      packed = jnp.where(self._head == head, full[self.rows(head)], packed)
    return packed

  def unpack(self, packed: jax.Array) -> jax.Array:
    """[D, lanes] as the diagonal blocks of [lanes, lanes]."""
    heads = range(self.plan.per_group)
    return jnp.concatenate([self.only(packed, head) for head in heads])
