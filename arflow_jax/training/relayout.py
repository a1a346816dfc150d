"""Parameters of earlier layouts: the same numbers in another shape.

A parameter keeps its name and the row-major order of its numbers; only the cut
into axes may change, as when the heads of attention got an axis of their own.
"""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from arflow_jax.errors import ConfigError

Tree = Any


def as_stored(wanted: Tree, stored: Tree) -> Tree:
  """What to read: `wanted`, in the shapes that are stored.

  Args:
    wanted: tree of `ShapeDtypeStruct`s with named shardings.
    stored: tree of at least the same leaves, which have a `shape`.

  Raises:
    ConfigError: a leaf of another size, which is another network.
  """
  shapes = {
    name(path): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(stored)
    if hasattr(leaf, "shape")
  }

  def read(path, leaf):
    shape = shapes.get(name(path), leaf.shape)  # what is missing fails later
    if shape == leaf.shape:
      return leaf
    if math.prod(shape) != math.prod(leaf.shape):
      raise ConfigError(
        f"the checkpoint holds {jax.tree_util.keystr(path)} as {shape}, which"
        f" does not make the {leaf.shape} of this network"
      )
    return jax.ShapeDtypeStruct(
      shape, leaf.dtype, sharding=_sharding(leaf, shape)
    )

  return jax.tree_util.tree_map_with_path(read, wanted)


def as_wanted(loaded: Tree, wanted: Tree) -> Tree:
  """The loaded arrays in the shapes and shardings of `wanted`."""
  pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted))
  if all(array.shape == leaf.shape for array, leaf in pairs):
    return loaded

  def reshape(tree):
    return jax.tree.map(lambda a, leaf: a.reshape(leaf.shape), tree, wanted)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
  return jax.jit(reshape, out_shardings=shardings, donate_argnums=0)(loaded)


def _sharding(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> Any:
  """Split like `leaf` along the axes before and after those that differ."""
  if not isinstance(leaf.sharding, NamedSharding):
    return leaf.sharding
  spec = list(leaf.sharding.spec)
  spec += [None] * (len(leaf.shape) - len(spec))
  front = _common(shape, leaf.shape)
  rest = min(len(shape), len(spec)) - front
  back = min(_common(shape[::-1], leaf.shape[::-1]), rest)
  middle = [None] * (len(shape) - front - back)
  tail = spec[len(spec) - back :]
  return NamedSharding(
    leaf.sharding.mesh, PartitionSpec(*spec[:front], *middle, *tail)
  )


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
  """How many sizes agree from the start."""
  same = 0
  for x, y in zip(a, b):
    if x != y:
      break
    same += 1
  return same


def name(path: Any) -> tuple[str, ...]:
  """A path whose containers do not matter: a field is as good as a key."""
  keys = []
  for entry in path:
    for attribute in ("key", "idx", "name"):
      if hasattr(entry, attribute):
        keys.append(str(getattr(entry, attribute)))
        break
  return tuple(keys)
