"""One mesh, `data x fsdp x tensor`, and what lives where on it.

Layers name the axes of their parameters; `RULES` is the only place that says
which mesh axes a name is split over. What has no name there is whole on every
device: of a parameter's axes, those that no rule splits.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from arflow_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")

# `mesh.fsdp=0` takes as many devices as divide this. All published widths are
# multiples of it, and it leaves 0.7 GB of ARFlow-XL/2's state on each.
_FSDP = 16

# Logical names of axes, and the mesh axes that split them.
RULES = {
  "batch": ("data", "fsdp"),  # items of a batch
  "embed": "fsdp",  # features of a token
  "modulation": "fsdp",  # shifts, scales and gates of a layer
  "heads": "tensor",  # whole heads of attention
  "mlp": "tensor",  # hidden features of a feed-forward
}


def make_mesh(
  mesh: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A `data x fsdp x tensor` mesh in the order that suits the hardware.

  Of several slices each holds whole rows of `data`: between slices only the
  gradients are summed.

  Args:
    mesh: the config group; see `sizes`.
    devices: those to use, which may be the description of a pod; None stands
      for all there are.

  Raises:
    ConfigError: sizes that do not make the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  shape = sizes(mesh, len(devices), slices)
  if shape[0] % slices:
    raise ConfigError(
      f"mesh.data={shape[0]} (mesh.fsdp={shape[1]}, mesh.tensor={shape[2]}) is"
      f" not a multiple of the {slices} slices, over which only data is split"
    )
  if slices > 1:
    ordered = mesh_utils.create_hybrid_device_mesh(
      (shape[0] // slices, *shape[1:]),
      (slices, 1, 1),
      devices,
      allow_split_physical_axes=True,
    )
  else:
    ordered = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return Mesh(ordered, AXES)


def sizes(
  mesh: ConfigDict, count: int, slices: int = 1
) -> tuple[int, int, int]:
  """Sizes of `data`, `fsdp` and `tensor` on so many devices.

  Args:
    mesh: the config group. -1 takes what the other axes leave; 0, of `fsdp`
      alone, the largest divisor of 16 that they leave in one slice.
    count: of devices.
    slices: that they make up.

  Raises:
    ConfigError: sizes that do not make them; it names the nearest that do.
  """
  wanted = [mesh[axis] for axis in AXES]
  if wanted[1] == 0:
    given = math.prod(size for size in (wanted[0], wanted[2]) if size > 0)
    wanted[1] = math.gcd(_FSDP, max(count // (given * slices), 1))
  if wanted.count(-1) > 1:
    raise ConfigError(
      f"{_named(wanted)}: only one of them can be -1, which takes the devices"
      " that the others leave"
    )
  rest = count // max(math.prod(size for size in wanted if size != -1), 1)
  found = [rest if size == -1 else size for size in wanted]
  if min(found) < 1 or math.prod(found) != count:
    # Of all sizes that make them, the nearest by their ratios.
    best = min(
      _factors(count),
      key=lambda shape: sum(
        abs(math.log(size / max(asked, 1)))
        for size, asked in zip(shape, wanted)
        if asked != -1
      ),
    )
    raise ConfigError(
      f"{_named(wanted)} does not make {count} devices; the nearest that does:"
      f" {_named(best)}"
    )
  return tuple(found)


def _named(shape: Sequence[int]) -> str:
  """Sizes of the axes as the config has them."""
  pairs = zip(AXES, shape)
  return " x ".join(f"mesh.{axis}={size}" for axis, size in pairs)


def _factors(count: int) -> list[tuple[int, int, int]]:
  """All sizes of the three axes that make so many devices."""
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  return [
    (count // (fsdp * tensor), fsdp, tensor)
    for tensor in divisors
    for fsdp in divisors
    if count % (fsdp * tensor) == 0
  ]


def _nearest(wanted: int, divided: int) -> str:
  """The divisors of a number that are next to a wanted one, as text."""
  small = [n for n in range(1, math.isqrt(divided) + 1) if divided % n == 0]
  divisors = sorted({*small, *(divided // n for n in small)})
  below = [n for n in divisors if n < wanted][-1:]
  return " or ".join(map(str, below + [n for n in divisors if n > wanted][:1]))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
  """Into how many parts a batch is split."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, parts: int) -> None:
  """Raises ConfigError unless every micro-batch can be split evenly.

  Args:
    mesh: the device mesh.
    batch_size: items of a step, over all devices.
    parts: micro-batches of a step.
  """
  if parts < 1 or batch_size % parts:
    raise ConfigError(
      f"optimizer.accumulation={parts} does not divide batch_size={batch_size};"
      f" the nearest that does: {_nearest(parts, batch_size)}"
    )
  unit = parts * batch_shards(mesh)
  if batch_size % unit:
    below = batch_size // unit * unit
    near = [size for size in (below, below + unit) if size]
    raise ConfigError(
      f"batch_size={batch_size} is not a multiple of {unit} (mesh.data"
      f"={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']} x"
      f" optimizer.accumulation={parts}); the nearest that is:"
      f" {' or '.join(map(str, near))}"
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


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over the axes of batches."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


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
  split: dict[str, int] = {}  # what a mesh axis has to divide

  def spec(names, array):
    lead = [None] * (len(array.shape) - len(names))
    found = lead + [RULES.get(name) for name in names]
    for size, axis in zip(array.shape, found):
      if axis:
        split[axis] = math.gcd(split.get(axis, 0), size)
    return PartitionSpec(*found)

  def check(path, spec, array):
    for size, axis in zip(array.shape, spec):
      if axis and size % mesh.shape[axis]:
        serve = math.gcd(split[axis], mesh.size)
        raise ConfigError(
          f"mesh.{axis}={mesh.shape[axis]} does not divide {size}, an axis of"
          f" {jax.tree_util.keystr(path)} {tuple(array.shape)}; the nearest"
          f" that divides all: {_nearest(mesh.shape[axis], serve)}"
        )
    return NamedSharding(mesh, spec)

  is_names = lambda leaf: isinstance(leaf, tuple)
  specs = jax.tree.map(spec, axes, shapes, is_leaf=is_names)
  return jax.tree_util.tree_map_with_path(check, specs, shapes)


def abstract_params(axes: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Shapes, types and shardings of parameters; arguments as above."""
  return jax.tree.map(
    lambda array, sharding: jax.ShapeDtypeStruct(
      array.shape, array.dtype, sharding=sharding
    ),
    shapes,
    param_shardings(axes, shapes, mesh),
  )
