"""Whether a train step can fit its devices at all, told before it is compiled.

A lower bound: the state, the gradients, the batch, and half of what the
backward pass keeps of the forward pass, for XLA may keep less than is traced.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from arflow_jax.branches import Branch
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import state

# No network keeps more bytes than this for each byte of its batch. Small
# batches are not traced, which takes up to a second.
_LARGEST_RATIO = 100_000


def check(
  config: ConfigDict,
  branch: Branch,
  mesh: Mesh,
  abstract_state: state.TrainState,
  abstract_batch: dict[str, jax.ShapeDtypeStruct],
) -> None:
  """Raises ConfigError where a train step clearly does not fit a device.

  Args:
    config: the full config.
    branch: the model family.
    mesh: the devices; where none of them is here, nothing is refused.
    abstract_state: shapes, types and shardings of the train state.
    abstract_batch: those of a global batch.
  """
  there = mesh_lib.memory(mesh.devices.flat)
  if there is None:
    return
  params, parts = abstract_state.params, config.optimizer.accumulation
  fixed = size(abstract_state) + gradients(params, mesh, parts)
  if fixed > there:
    sizes = ", ".join(
      f"model.{key}={value}"
      for key, value in config.model.items()
      if type(value) is int
    )
    split = f"or raise mesh.fsdp={mesh.shape['fsdp']}"
    if parts > 1:
      split += f" with optimizer.accumulation=1 instead of {parts}"
    raise ConfigError(
      "the weights, averages, moments and gradients of this model take"
      f" {_readable(fixed)} on each device, which has {_readable(there)}: lower"
      f" one of {sizes}, {split}"
    )
  needed = size(abstract_batch)
  if fixed + needed * _LARGEST_RATIO <= there:
    return
  parts *= mesh_lib.batch_shards(mesh)
  held = kept(branch, params, abstract_batch, parts)
  needed += held // (2 * mesh.shape["tensor"])
  if fixed + needed > there:
    raise ConfigError(
      f"batch_size={config.batch_size} takes at least {_readable(needed)} on"
      f" each device, beside {_readable(fixed)} for the model, and a device has"
      f" {_readable(there)}: lower batch_size or"
      f" data.sequence_length={config.data.sequence_length}, or raise"
      f" optimizer.accumulation={config.optimizer.accumulation}"
    )


def gradients(params: Any, mesh: Mesh | AbstractMesh, parts: int) -> int:
  """Bytes of the gradients on each device, with whatever is beside them.

  Several micro-batches add up whole gradients, float32, and use whole weights,
  at least of two bytes; see `training.gradients`.

  Args:
    params: shapes, types and shardings of the parameters.
    mesh: the devices.
    parts: micro-batches of a step.
  """
  held = size(params)
  if parts == 1 or mesh_lib.batch_shards(mesh) == 1:
    return held
  whole = held * mesh.shape["fsdp"]  # but for a few biases, whole already
  return whole + (whole // 2 if whole > held else 0)


def kept(
  branch: Branch,
  params: Any,
  batch: dict[str, jax.ShapeDtypeStruct],
  parts: int,
) -> int:
  """Bytes that the backward pass of one of `parts` of a batch keeps."""
  part = {
    name: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype)
    for name, x in batch.items()
  }

  def forward(params, batch):
    rows = len(batch["labels"])
    keys = state.item_keys(0, jnp.int32(0), rows)
    mean = lambda params: jnp.mean(branch.loss(params, batch, keys))
    return jax.vjp(mean, params)[1]

  whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  return size(jax.eval_shape(forward, whole, part)) - size(whole)


def size(tree: Any) -> int:
  """Bytes of all leaves, of their shards where they are split."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.shape
    if leaf.sharding:
      shape = leaf.sharding.shard_shape(shape)
    total += leaf.dtype.itemsize * math.prod(shape)
  return total


def _readable(size: int) -> str:
  """Bytes as people write them."""
  unit = 10**9 if size >= 10**9 else 10**6
  return f"{size / unit:,.1f} {'GB' if unit == 10**9 else 'MB'}"
