"""One mesh, `data x fsdp`, and where parameters and batches live on it.

Layers name the axes of their parameters; `RULES` is the only place that says
which mesh axis a name is split over. Batches are split over both axes.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from arflow_jax.errors import ConfigError

RULES = {"embed": "fsdp"}


def make_mesh(mesh: ConfigDict, batch_size: int) -> Mesh:
  """All devices as a `data x fsdp` mesh; `data=-1` takes what fsdp leaves.

  Raises:
    ConfigError: sizes that do not multiply to the number of devices, or a batch
      that they do not divide.
  """
  devices = jax.devices()
  data = mesh.data if mesh.data != -1 else len(devices) // max(mesh.fsdp, 1)
  if min(data, mesh.fsdp) < 1 or data * mesh.fsdp != len(devices):
    raise ConfigError(
      f"mesh.data={mesh.data} x mesh.fsdp={mesh.fsdp} does not make the"
      f" {len(devices)} devices here; set mesh.data=-1 and let fsdp divide them"
    )
  if batch_size % len(devices):
    raise ConfigError(
      f"batch_size={batch_size} (per micro-batch) is not a multiple of the"
      f" {len(devices)} devices"
    )
  return Mesh(np.array(devices).reshape(data, mesh.fsdp), ("data", "fsdp"))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over every device."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def param_shardings(axes: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Sharding of every parameter from the logical names of its axes.

  Names count from the last axis; stacked layers add axes in front, unsplit.

  Args:
    axes: tree of tuples of names (or None), shaped like the parameters.
    shapes: the same tree of arrays or `ShapeDtypeStruct`s.
    mesh: the device mesh.

  Raises:
    ConfigError: an axis that the mesh axis does not divide. Such a parameter is
      never replicated in silence.
  """

  def sharding(path, names, array):
    spec = [None] * (len(array.shape) - len(names))
    spec += [RULES.get(name) for name in names]
    for size, axis in zip(array.shape, spec):
      if axis and size % mesh.shape[axis]:
        raise ConfigError(
          f"mesh.{axis}={mesh.shape[axis]} does not divide {size}, an axis of"
          f" {jax.tree_util.keystr(path)} {tuple(array.shape)}"
        )
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(
    sharding, axes, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
  )
