"""Whether devices that should hold the same numbers do: `debug.replicas`.

A faulty device, or a program that is not the same everywhere, lets the replicas
of a parameter drift apart in silence: the loss is a mean of them all. So each
device makes a checksum of its own part of every parameter, one pass over the
memory, and those of the same part have to be equal bit for bit.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from arflow_jax.errors import ReplicasDiffer
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.parallel import processes
from arflow_jax.training import checksum, relayout

_LISTED = 8  # devices in a message


class Replicas:
  """Compares the replicas of parameters.

  Args:
    params: shapes, types and shardings of the parameters.
  """

  def __init__(self, params: Any):
    self._params = params
    leaves = jax.tree.leaves(params)
    self._mesh = leaves[0].sharding.mesh
    row = PartitionSpec(mesh_lib.AXES)

    def own(*parts):  # [1, parameters] of each device
      return jnp.stack([checksum.of_array(part) for part in parts])[None]

    self._sums = jax.jit(
      jax.shard_map(
        own,
        mesh=self._mesh,
        in_specs=tuple(leaf.sharding.spec for leaf in leaves),
        out_specs=row,
        check_vma=False,
      )
    )

  def check(self, step: int, params: Any) -> None:
    """Compares them, in all processes; waits for the devices.

    Args:
      step: optimiser steps done, for the message.
      params: the parameters.

    Raises:
      ReplicasDiffer: some replicas are not the same.
    """
    # A device's row stands where the device stands in the mesh.
    sums = processes.whole(self._sums(*jax.tree.leaves(params)))
    row = {device: i for i, device in enumerate(self._mesh.devices.flat)}
    leaves = jax.tree_util.tree_leaves_with_path(self._params)
    for column, (path, leaf) in enumerate(leaves):
      parts = collections.defaultdict(lambda: collections.defaultdict(list))
      places = leaf.sharding.devices_indices_map(leaf.shape)
      for device, place in places.items():
        found = int(sums[row[device], column])
        parts[str(place)][found].append(device)
      for groups in parts.values():
        if len(groups) > 1:
          name = "/".join(relayout.name(path))
          raise ReplicasDiffer(_told(step, name, groups))


def _told(step: int, name: str, groups: dict[int, list[jax.Device]]) -> str:
  few, *others = sorted(groups.values(), key=len)
  rest = [device for group in others for device in group]
  return (
    f"replicas of {name} differ after step {step}: {_devices(few)} held other"
    f" numbers than {_devices(rest)}. Checkpoints since the comparison before"
    " may hold them: move these away, and start the same command again without"
    " the machine at fault"
  )


def _devices(devices: list[jax.Device]) -> str:
  shown = ", ".join(
    f"{device.id} (process {processes.owner(device)})"
    for device in devices[:_LISTED]
  )
  more = f" and {len(devices) - _LISTED} more" if devices[_LISTED:] else ""
  return f"device{'s' if devices[1:] else ''} {shown}{more}"
