"""The public operator: its XLA form, and where the kernel takes over."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError
from arflow_jax.kernels import shards
from arflow_jax.kernels.modulated_norm import pallas_tpu

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_tpu_interpret")


def modulated_norm(
  x: Float[Array, "B S N E"],
  shift: Float[Array, "B S E"],
  scale: Float[Array, "B S E"],
  *,
  dtype: jax.typing.DTypeLike,
  implementation: str | None = None,
) -> tuple[Float[Array, "B S N E"], Float[Array, "B S N E"]]:
  """`LN(x) (1 + scale) + shift`, and `x`: go on with this one.

  The norm is over the last axis, without affine, eps 1e-6, in float32. The
  gradient of what becomes of `x` is added where the norm's own is computed.

  Args:
    x: float32 tokens.
    shift: float32, one row for each image.
    scale: likewise.
    dtype: of the modulated tokens.
    implementation: one of `IMPLEMENTATIONS`, or None for the best one known.

  Returns:
    `x`, and the modulated tokens.

  Raises:
    ConfigError: a named implementation that cannot serve here.
  """
  name = implementation
  reason = _misfit(name or "pallas_tpu", x.shape)
  if name is None:
    name = "xla" if reason else "pallas_tpu"
  elif reason:
    raise ConfigError(f"implementation={name!r}: {reason}")
  if name == "xla":
    return x, _xla(x, shift, scale).astype(dtype)
  function = functools.partial(
    pallas_tpu.modulated_norm,
    jnp.dtype(dtype),
    name == "pallas_tpu_interpret",
  )
  batch_axes, other, sizes = shards.axes()
  if math.prod(sizes.values()) == 1:
    return function(x, shift, scale)
  rows = PartitionSpec(batch_axes)
  return jax.shard_map(
    function,
    in_specs=(rows, rows, rows),
    out_specs=(rows, rows),
    axis_names={*batch_axes, *other},
    check_vma=False,
  )(x, shift, scale)


def _xla(x, shift, scale):
  x = x - jnp.mean(x, -1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + pallas_tpu.EPSILON)
  return x * (1 + scale[..., None, :]) + shift[..., None, :]


def _misfit(name: str, shape: tuple[int, ...]) -> str | None:
  """Why an implementation cannot serve here, or None where it can."""
  if name not in IMPLEMENTATIONS:
    return f"unknown; choose from {', '.join(IMPLEMENTATIONS)}"
  if name == "xla":
    return None
  if name == "pallas_tpu" and shards.platform() != "tpu":
    return f"it needs a TPU, this is a {shards.platform()}"
  if shape[2] % 16 or shape[3] % 128:
    return (
      f"{shape[2]} tokens of {shape[3]} features: the kernel takes multiples of"
      " 16 and of 128"
    )
  if explicit := shards.explicit_axes():
    return f"mesh axes {explicit} are explicit; make them AxisType.Auto"
  batch_axes, _, sizes = shards.axes()
  if shape[0] % math.prod(sizes[axis] for axis in batch_axes):
    return f"the mesh axes {batch_axes} do not divide {shape[0]} sequences"
  return None
