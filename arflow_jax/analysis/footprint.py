"""Bytes that a train step takes on one device, by a formula.

The state and the gradients by their shards; for each item what the backward
pass keeps of the forward pass, traced from shapes alone, and 0.45 of what one
layer without remat keeps; the weights of three layers where they are gathered.
The README of this folder states how far it is from what XLA plans.
"""

import functools
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax.nn.stack import REMAT
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import memory, optimizer, state

_WORKING = 0.45  # of what a layer keeps without remat, while it is recomputed
_FUSED = 0.97  # of what is traced without remat, XLA keeps
_GATHERED = 3  # layers of whole weights: this one, the next one, a gradient


def mesh(config: ConfigDict, devices: int, slices: int = 1) -> AbstractMesh:
  """The mesh of a config on so many devices, in so many slices.

  Raises:
    ConfigError: sizes that do not multiply to them, or a batch that they do
      not divide.
  """
  sizes = mesh_lib.sizes(config.mesh, devices, slices)
  made = AbstractMesh(sizes, mesh_lib.AXES)
  mesh_lib.check_batch(made, config.batch_size, config.optimizer.accumulation)
  return made


def divide(
  config: ConfigDict,
  devices: int,
  tpu: bool,
  factor: float = 1.0,
  slices: int = 1,
) -> dict[str, int]:
  """Bytes on one of so many devices, by what takes them, and their `total`.

  Args:
    config: the full config.
    devices: of the whole mesh.
    tpu: whether attention is the kernel for TPUs.
    factor: on what is neither state nor batch, from a compiled program.
    slices: that the devices make up.

  Raises:
    ConfigError: a mesh or a batch that does not divide.
  """
  where = mesh(config, devices, slices)
  branch, weights = _built(_shape(config), config.model.remat)
  placed = mesh_lib.abstract_params(branch.axes, weights, where)
  shards = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype),
    placed,
  )
  parts = _state(config, branch, shards)
  items = config.batch_size // mesh_lib.batch_shards(where)
  parts["batch"] = items * (4 * math.prod(branch.item_shape) + 4)
  model = config.model
  layers = sum(model[key] for key in model if key.endswith("depth"))
  kept = functools.partial(_kept, _shape(config), tpu)
  if model.remat == "none":
    item = _FUSED * kept("none")
  else:
    item = kept(model.remat) + _WORKING * kept("none") / layers
  micro, whole = config.optimizer.accumulation, memory.size(weights)
  needed = memory.gradients(placed, where, micro)
  needed += item * items / (micro * where.shape["tensor"])
  if micro > 1:  # beside the sum, what one part adds to it
    split = mesh_lib.batch_shards(where) > 1
    needed += whole / where.shape["tensor"] if split else parts["parameters"]
  elif whole > parts["parameters"]:
    needed += _GATHERED * whole / layers
  parts["temporaries"] = int(factor * needed)
  return parts | {"total": sum(parts.values())}


def state_bytes(abstract: state.TrainState) -> dict[str, int]:
  """Bytes of the parts of a train state, on one device."""
  return {
    "parameters": memory.size(abstract.params),
    "optimiser": memory.size(abstract.opt_state),
    "average": memory.size(abstract.ema),
  }


def checkpoint(config: ConfigDict) -> int:
  """Bytes of parameters, optimiser and average in all, uncompressed."""
  branch, weights = _built(_shape(config), config.model.remat)
  return sum(_state(config, branch, weights).values())


def _state(
  config: ConfigDict, branch: branches.Branch, weights: Any
) -> dict[str, int]:
  tx = optimizer.make_optimizer(config.optimizer, branch.axes)
  return {
    "parameters": memory.size(weights),
    "optimiser": memory.size(jax.eval_shape(tx.init, weights)),
    "average": memory.size(weights),
  }


def options(
  config: ConfigDict, devices: int, slices: int = 1
) -> dict[str, list]:
  """Values of the settings that take less memory, the nearest first.

  All but the batch leave what is computed as it is, but for rounding.
  """
  _, fsdp, tensor = mesh_lib.sizes(config.mesh, devices, slices)
  shards = devices // tensor  # of a batch
  items, parts = config.batch_size // shards, config.optimizer.accumulation
  policies = list(REMAT)  # in the order of what they take
  policy = config.model.remat
  powers = [fsdp * 2**i for i in range(1, devices.bit_length())]
  return {
    "model.remat": policies[policies.index(policy) + 1 :],
    "mesh.fsdp": [size for size in powers if size <= shards],
    "optimizer.accumulation": [n for n in _divisors(items) if n > parts],
    "batch_size": [n * shards for n in _divisors(items)[-2::-1]],
  }


def changes(
  config: ConfigDict, devices: int, slices: int = 1
) -> Iterator[dict[str, Any]]:
  """Changes of one setting or more, the least first; the batch stays."""
  keys = ["optimizer.accumulation", "mesh.fsdp", "model.remat"]
  found = options(config, devices, slices)
  for values in itertools.product(*([None, *found[key]] for key in keys)):
    chosen = {k: v for k, v in zip(keys, values) if v is not None}
    if chosen:
      yield chosen


def changed(config: ConfigDict, change: dict[str, Any]) -> ConfigDict:
  """A config with some keys set; the axis `data` takes what is left."""
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(change)
  config.mesh.data = -1
  return config.lock()


def _divisors(count: int) -> list[int]:
  low = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
  return sorted({*low, *(count // n for n in low)})


def _shape(config: ConfigDict) -> str:
  """What tells how much an item keeps, as text; without remat."""
  kept = config.copy_and_resolve_references().unlock()
  kept.batch_size, kept.optimizer.accumulation = 1, 1
  kept.model.remat = "none"
  kept.mesh.fsdp = kept.mesh.tensor = 1
  return json.dumps(kept.to_dict())


@functools.lru_cache
def _built(shape: str, remat: str) -> tuple[branches.Branch, Any]:
  """The model of what `_shape` made, and the shapes of its weights."""
  config = ConfigDict(json.loads(shape))
  config.model.remat = remat
  branch = branches.build(config)
  return branch, jax.eval_shape(branch.init, jax.random.key(0))


@functools.lru_cache
def _kept(shape: str, tpu: bool, remat: str) -> int:
  """Bytes that one item more keeps for the backward pass."""
  branch, weights = _built(shape, remat)
  device = AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
  one = AbstractMesh((1,), ("data",), abstract_device=device if tpu else None)

  def of(items):
    batch = {
      "images": jax.ShapeDtypeStruct((items, *branch.item_shape), jnp.float32),
      "labels": jax.ShapeDtypeStruct((items,), jnp.int32),
    }
    with jax.sharding.use_abstract_mesh(one):
      return memory.kept(branch, weights, batch, 1)

  return of(2) - of(1)
