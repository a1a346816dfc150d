"""The ambient mesh: where operators run, and what each device computes."""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

# The mesh axis that splits heads; every other axis splits the batch.
HEADS_AXIS = "tensor"


def platform() -> str:
  """Where the program will run: the ambient mesh knows, or else JAX."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def axes() -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]:
  """Axes of the ambient mesh that split batch and heads, and their sizes.

  Those of size one too: a kernel wants to be told of every axis. Axes of an
  outer `shard_map` are split already and left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind == AxisType.Auto
  }
  batch = tuple(name for name in sizes if name != HEADS_AXIS)
  heads = tuple(name for name in sizes if name == HEADS_AXIS)
  return batch, heads, sizes


def explicit_axes() -> tuple[str, ...]:
  """Axes of the ambient mesh whose shardings are part of the types."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind == AxisType.Explicit and mesh.shape[name] > 1
  )


def call(
  function: Callable, operands: dict[str, Array | None], batch: int, heads: int
) -> tuple[Array, Array]:
  """Calls `function(**operands)`, on each device with its own share.

  Args:
    function: returns output and state.
    operands: of the operator, by name.
    batch: B, over all devices; axes that do not divide it are left to XLA.
    heads: H, over all devices, likewise.
  """
  batch_axes, heads_axes, sizes = axes()
  if math.prod(sizes.values()) == 1:
    return function(**operands)
  if batch % math.prod(sizes[axis] for axis in batch_axes):
    batch_axes = ()
  if heads % math.prod(sizes[axis] for axis in heads_axes):
    heads_axes = ()
  if not batch_axes and not heads_axes:
    return function(**operands)
  tokens = PartitionSpec(batch_axes, None, heads_axes)
  memory = PartitionSpec(batch_axes, heads_axes)
  special = {"state": memory, "scales": PartitionSpec(batch_axes)}
  specs = {
    name: None if x is None else special.get(name, tokens)
    for name, x in operands.items()
  }
  return jax.shard_map(
    lambda operands: function(**operands),
    in_specs=(specs,),
    out_specs=(tokens, memory),
    axis_names={*batch_axes, *heads_axes},
    check_vma=False,
  )(operands)
