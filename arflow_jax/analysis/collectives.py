"""What the devices of a compiled program send to one another.

Read from the program's text. One exchange may stand there several times, in
pieces that run beside products; its channel tells that it is one, or, where
all have the same channel, that one piece starts it and others go on with it.
"""

import collections
import math
import re
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Int

from arflow_jax.analysis import tpu

_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_INSTRUCTION = re.compile(
  r"\s*(?:ROOT )?%[\w.\-]+ = (.+?) (" + "|".join(_KINDS) + r")(-start)?\("
)
# Slices hand their parts to the runtime of the data-center network.
_HANDED = re.compile(
  r"\s*(?:ROOT )?%[\w.\-]+ = \((\w+)\[([\d,]*)\].* send\(.*"
  r'handler_name="xla_megascale_runtime".*_transfer_type="(\w+)"'
)
SLICES = "slices"  # in place of mesh axes


class Exchange(NamedTuple):
  """Exchanges of one kind.

  Attributes:
    kind: such as "all-gather"; an all-reduce of which each device keeps its
      part only is a reduce-scatter.
    dtype: of the elements, as XLA calls it, such as "bf16".
    axes: the mesh axes along which devices exchange, such as "data" or
      "data+fsdp"; or `SLICES`, over the data-center network.
  """

  kind: str
  dtype: str
  axes: str


def sent(
  compiled: Any, mesh: Mesh | AbstractMesh, slices: int = 1
) -> dict[Exchange, tuple[int, int]]:
  """Bytes that one device sends in one run, and the number of exchanges.

  Around a ring of n devices: (n-1)/n of the whole array to gather or scatter
  it, twice that to reduce it, and all of it to pass it on. So also between
  slices, of what a device hands to the data-center network.

  Args:
    compiled: the program; loops count by their length.
    mesh: in the order of the program's devices.
    slices: that these devices make up.
  """
  total: dict[Exchange, list[int]] = collections.defaultdict(lambda: [0, 0])
  found: dict[str, tuple[int, str, str]] = {}
  text = compiled.as_text()
  ends = set(
    re.findall(r"%async-collective-done[\w.\-]* = .*calls=%([\w.\-]+)", text)
  )
  for times, place, line in tpu.instructions(text, fusions=True):
    if place in ends or place.startswith("async_collective_fusion"):
      continue  # it was counted where it starts
    if handed := _HANDED.match(line):
      kind = handed[3].lower().replace("_", "-")
      row = total[Exchange(kind, handed[1], SLICES)]
      share = (slices - 1) / slices * (2 if kind == "all-reduce" else 1)
      row[0] += times * int(share * _size(handed[1], handed[2]))
      row[1] += times
    elif match := _INSTRUCTION.match(line):
      kind = match[2]
      if place.startswith("all-reduce-scatter"):  # each keeps its part of it
        kind = "scattered"
      channel = re.search(r"channel_id=(\d+)", line)
      # All that shard_map asks for has the number 1; other numbers are unique.
      key = channel[1] if channel and channel[1] != "1" else line
      if times > found.get(key, (0,))[0]:
        found[key] = (times, kind, line)
  for times, kind, line in found.values():
    group = _members(line, mesh.size)
    share = (len(group) - 1) / len(group)
    factor = {
      "all-reduce": 2 * share,
      "reduce-scatter": share * len(group),  # the result is one part
      "collective-permute": 1,
    }.get(kind, share)
    for dtype, size in _arrays(_INSTRUCTION.match(line)):
      name = "reduce-scatter" if kind == "scattered" else kind
      row = total[Exchange(name, dtype, _axes(group, mesh))]
      row[0] += times * int(size * factor)
      row[1] += times
  return {exchange: tuple(row) for exchange, row in total.items()}


def _arrays(instruction: re.Match) -> list[tuple[str, int]]:
  """Types and bytes of what an exchange handles."""
  found = [
    (kind, _size(kind, dims))
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", instruction[1])
  ]
  if instruction[3] and instruction[2] != "all-reduce":
    return [max(found, key=lambda x: x[1])]  # beside what goes in, and marks
  return found


def _size(dtype: str, dims: str) -> int:
  """Bytes of an array such as `f32` of `4,128`."""
  return math.prod(map(int, filter(None, dims.split(",")))) * _width(dtype)


def _width(dtype: str) -> int:
  bits = re.search(r"\d+", dtype)
  return max(1, int(bits[0]) // 8) if bits else 1  # pred has no number


def _members(line: str, count: int) -> Int[np.ndarray, "n"]:
  """Positions in the program's devices of the first group that exchanges."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
    return np.array([int(pairs[1]), int(pairs[2])])
  if named := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}",
    line,
  ):
    sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named[1])}
    order = _iota(named[2]) if named[2] else np.arange(count)
    grid = order.reshape(tuple(sizes.values()))
    wanted = re.findall(r"'(\w+)'", named[3])
    if ":(" in named[3]:
      raise ValueError(f"cannot read the groups of {line.strip()[:200]}")
    index = tuple(slice(None) if a in wanted else 0 for a in sizes)
    return grid[index].reshape(-1)
  if listed := re.search(
    r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line
  ):
    return _iota(listed[3]).reshape(int(listed[1]), int(listed[2]))[0]
  if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return np.array([int(x) for x in explicit[1].split(",")])
  return np.arange(count)  # all of them


def _iota(text: str) -> Int[np.ndarray, "n"]:
  """Numbers in the order of `[4,2]T(1,0)`: counted, reshaped, transposed."""
  shape, _, turned = text.partition("T")
  dims = [int(x) for x in re.findall(r"\d+", shape)]
  grid = np.arange(math.prod(dims)).reshape(dims)
  if turned:
    grid = grid.transpose([int(x) for x in re.findall(r"\d+", turned)])
  return grid.reshape(-1)


def _axes(group: Int[np.ndarray, "n"], mesh: Mesh | AbstractMesh) -> str:
  """Names of the mesh axes along which the devices of a group differ."""
  places = np.unravel_index(group, tuple(mesh.shape.values()))
  names = [
    name
    for name, place in zip(mesh.axis_names, places)
    if len(set(place.tolist())) > 1
  ]
  return "+".join(names) or "none"
