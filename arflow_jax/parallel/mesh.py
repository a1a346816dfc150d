"""One mesh, `data x fsdp`, and where parameters and batches live on it.

Layers name the axes of their parameters; `RULES` is the only place that says
which mesh axis a name is split over. Batches are split over both axes.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from arflow_jax.errors import ConfigError

RULES = {"embed": "fsdp"}


def make_mesh(
  mesh: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A `data x fsdp` mesh in the order that suits the hardware.

  Args:
    mesh: the config group; `data=-1` takes what fsdp leaves.
    devices: those to use, which may be the description of a pod; None stands
      for all there are.

  Raises:
    ConfigError: sizes that do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  ordered = mesh_utils.create_device_mesh(
    sizes(mesh, len(devices)), devices, allow_split_physical_axes=True
  )
  return Mesh(ordered, ("data", "fsdp"))


def sizes(mesh: ConfigDict, count: int) -> tuple[int, int]:
  """Sizes of `data` and `fsdp` on so many devices.

  Raises:
    ConfigError: sizes that do not multiply to them.
  """
  data = mesh.data if mesh.data != -1 else count // max(mesh.fsdp, 1)
  if min(data, mesh.fsdp) < 1 or data * mesh.fsdp != count:
    raise ConfigError(
      f"mesh.data={mesh.data} x mesh.fsdp={mesh.fsdp} does not make {count}"
      " devices; set mesh.data=-1 and let mesh.fsdp divide them"
    )
  return data, mesh.fsdp


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, parts: int) -> None:
  """Raises ConfigError unless devices share every micro-batch evenly.

  Args:
    mesh: the device mesh.
    batch_size: items of a step, over all devices.
    parts: micro-batches of a step.
  """
  if parts < 1 or batch_size % parts:
    raise ConfigError(
      f"optimizer.accumulation={parts} does not divide batch_size={batch_size}"
    )
  if batch_size // parts % mesh.size:
    raise ConfigError(
      f"batch_size={batch_size // parts} (per micro-batch) is not a multiple of"
      f" the {mesh.size} devices"
    )


def memory(devices: Iterable[Any]) -> int | None:
  """Bytes that each of some devices has, or None where nobody knows.

  Devices that are not here, such as those of a description, tell nothing. On a
  CPU all devices share the memory of the machine.
  """
  here = set(devices) & set(jax.local_devices())
  if not here:
    return None
  device = min(here, key=lambda device: device.id)
  if device.platform == "cpu":
    if "SC_PHYS_PAGES" not in os.sysconf_names:
      return None
    pages = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE") // len(here)
  return (device.memory_stats() or {}).get("bytes_limit")


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


def abstract_params(axes: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Shapes, types and shardings of parameters; arguments as above."""
  return jax.tree.map(
    lambda array, sharding: jax.ShapeDtypeStruct(
      array.shape, array.dtype, sharding=sharding
    ),
    shapes,
    param_shardings(axes, shapes, mesh),
  )
