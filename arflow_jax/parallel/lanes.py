"""What it costs on TPUs to cut arrays small.

A TPU holds arrays in tiles of 8 x 128 numbers (float32) and pads what does not
fill them. The compiler chooses which two axes lie along a tile.
"""

import itertools
import math
from typing import Any

import jax

LANES, ROWS = 128, 8


def note(state: Any, platform: str) -> str | None:
  """One line on shards narrower than a tile, where a TPU has such.

  Args:
    state: tree of `ShapeDtypeStruct`s with shardings.
    platform: of the devices.
  """
  if platform != "tpu":
    return None
  narrow, held, padded = set(), 0, 0
  for leaf in jax.tree.leaves(state):
    shape = leaf.sharding.shard_shape(leaf.shape)
    held += leaf.dtype.itemsize * math.prod(shape)
    padded += leaf.dtype.itemsize * padded_size(shape)
    if shape[-1:] != leaf.shape[-1:] and shape[-1] < LANES:
      narrow.add(f"{shape[-1]} of {leaf.shape[-1]}")
  if not narrow:
    return None
  return (
    f"some shards have {', '.join(sorted(narrow))} features, fewer than the"
    f" {LANES} lanes of a TPU's tile: padding takes about"
    f" {(padded - held) / 10**6:,.0f} MB on each device, beside"
    f" {held / 10**6:,.0f} MB of state; a smaller mesh.fsdp or mesh.tensor"
    " takes less"
  )


def padded_size(shape: tuple[int, ...]) -> int:
  """Numbers that an array takes in tiles, in the layout that takes fewest."""
  if len(shape) < 2:
    return math.prod(shape)  # vectors are packed

  def size(lanes: int, rows: int) -> int:
    rest = math.prod(n for i, n in enumerate(shape) if i not in (lanes, rows))
    return rest * _up(shape[lanes], LANES) * _up(shape[rows], ROWS)

  return min(
    size(*pair) for pair in itertools.permutations(range(len(shape)), 2)
  )


def _up(size: int, unit: int) -> int:
  return -(-size // unit) * unit
