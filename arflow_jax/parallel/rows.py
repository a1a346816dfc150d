"""Work that each device does on its own rows of a batch, and what it sums.

Inside `on_own_rows` a device holds its rows, and its part of every parameter
that `fsdp` splits: `gather` makes such a parameter whole, its transpose adds up
the gradients and leaves each device its part. Heads and hidden features stay
with the compiler, which splits them over `tensor`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from arflow_jax.parallel import mesh as mesh_lib

ROWS = mesh_lib.RULES["batch"]


def on_own_rows(
  function: Callable[..., tuple[jax.Array, Any]],
  axes: Any,
  mesh: Mesh | AbstractMesh,
) -> Callable[..., tuple[jax.Array, Any]]:
  """`function(params, *batch) -> (mean, gradients)`, run by every device.

  Args:
    function: gets parts of parameters and its own rows of every array of
      `batch`; returns a mean over them, and gradients of it shaped like the
      parts of the parameters. Both must be the same on all devices.
    axes: tree of the logical axes of every parameter.
    mesh: the devices.
  """
  # A kernel wants to be told of every axis, also of those of size one.
  own = {a for a in mesh_lib.AXES if a in ROWS or mesh.shape[a] == 1}

  def spec(names, array):
    lead = [None] * (array.ndim - len(names))
    split = [_split(name) for name in names]
    return PartitionSpec(*lead, *("fsdp" if s else None for s in split))

  def call(params, *batch):
    parts = map_params(spec, axes, params)
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(parts, *[PartitionSpec(ROWS)] * len(batch)),
      out_specs=(PartitionSpec(), parts),
      axis_names=own,
      check_vma=False,
    )(params, *batch)

  return call


def map_params(function: Callable[..., Any], axes: Any, params: Any) -> Any:
  """`function(names, array)` of every parameter.

  Args:
    function: gets the logical names of the last axes of an array, and it.
    axes: tree of tuples of names (or None), shaped like the parameters.
    params: the tree of arrays.
  """
  is_names = lambda leaf: isinstance(leaf, tuple)
  return jax.tree.map(function, axes, params, is_leaf=is_names)


def gather(names: tuple[str | None, ...], array: jax.Array) -> jax.Array:
  """A parameter, whole along `fsdp`.

  Args:
    names: logical names of its last axes.
    array: the part of it that this device holds.
  """
  for i, name in enumerate(names, array.ndim - len(names)):
    if _split(name):
      array = jax.lax.all_gather(array, "fsdp", axis=i, tiled=True)
  return array


def layer_parameter(
  names: tuple[str | None, ...], array: jax.Array
) -> jax.Array:
  """A layer's parameter as the layer wants it: whole, but for modulations."""
  return array if "modulation" in names else gather(names, array)


def layer_product(
  function: Callable[[jax.Array], jax.Array], rows: jax.Array
) -> jax.Array:
  """`function(rows)` where each device's function makes a part of the features.

  Every device along `fsdp` makes its features of the rows of all, and hands
  them back. A gradient in the function is thereby summed over these rows.

  Args:
    function: `[b, ..., E] -> [b, ..., part of F]`, rows apart.
    rows: those of this device.
  """
  features = function(jax.lax.all_gather(rows, "fsdp", tiled=True))
  return jax.lax.all_to_all(features, "fsdp", 0, features.ndim - 1, tiled=True)


def mean(names: tuple[str | None, ...], gradient: jax.Array) -> jax.Array:
  """The mean of a gradient over all devices that have rows of their own.

  Args:
    names: logical names of the parameter's last axes.
    gradient: what a device has after the transpose of `gather` or of
      `layer_product`: of what `fsdp` splits, the sum over `fsdp`.
  """
  summed = any(map(_split, names))
  total = jax.lax.psum(gradient, "data" if summed else ROWS)
  return total / jax.lax.axis_size(ROWS)


def _split(name: str | None) -> bool:
  return mesh_lib.RULES.get(name) == "fsdp"
