"""Published PyTorch weights to our parameters and back, by a table of names.

Each branch lists its `Row`s; this module does the rest: layouts, blocks that
are counted in their names and stacked in ours, and the full account of what is
missing, unexpected or misshapen. It reads arrays only and executes nothing.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from arflow_jax.config import flatten
from arflow_jax.errors import ConfigError

Params = dict[str, Any]
StateDict = dict[str, Float[np.ndarray, "..."]]


class Layout(NamedTuple):
  """How one array is turned round on the way out and on the way in.

  What comes in may still lack our cut into axes: only the order of its numbers
  must be ours.
  """

  out: Callable[[jax.Array], jax.Array]
  back: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)


def patch_convolution(patch: int, channels: int) -> Layout:
  """A projection of patches, `[p^2 C, E]`, as a convolution, (E, C, p, p)."""
  return Layout(
    lambda a: a.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
    lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
  )


class Row(NamedTuple):
  """One array: our dotted path, the published name, and its layout.

  A published name with `{}` stands for one array per layer; ours holds them
  stacked along the first axis.
  """

  ours: str
  theirs: str
  layout: Layout = SAME


def linear(
  ours: str, theirs: str, *, bias: bool = True, inputs: int = 1
) -> list[Row]:
  """The rows of a linear layer.

  Args:
    ours: its path.
    theirs: its published name.
    bias: whether it has one.
    inputs: how many of the kernel's axes go in; the others come out.
  """
  matrix = Layout(
    lambda a: a.reshape(math.prod(a.shape[:inputs]), -1).T, lambda a: a.T
  )
  rows = [Row(f"{ours}.kernel", f"{theirs}.weight", matrix)]
  if bias:
    vector = Layout(lambda a: a.reshape(-1), lambda a: a)
    rows.append(Row(f"{ours}.bias", f"{theirs}.bias", vector))
  return rows


def count_layers(state_dict: Mapping[str, Any], name: str) -> int:
  """How many of `name`, with `{}` for 0, 1, 2, ..., there are without a gap."""
  return next(i for i in itertools.count() if name.format(i) not in state_dict)


def sizes(
  state_dict: Mapping[str, Any], ranks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
  """Shapes of the entries that tell the sizes of a network, none empty.

  Args:
    state_dict: arrays by published name, not looked at yet.
    ranks: how many axes each of the named entries must have.

  Raises:
    ConfigError: an entry that is not there, of another rank, or empty.
  """
  found = {name: np.shape(state_dict.get(name)) for name in ranks}
  for name, rank in ranks.items():
    if len(found[name]) != rank or 0 in found[name]:
      there = found[name] if name in state_dict else "nothing"
      raise ConfigError(
        f"published weights lack {name} of {rank} axes, which tells the sizes"
        f" (found {there}); there are {len(state_dict)} names, such as"
        f" {sorted(state_dict)[:3]}"
      )
  return found


def simplest_ratio(hidden: int, features: Callable[[float], int]) -> float:
  """The ratio of the smallest denominator that gives so many features.

  Features are a rounded product, so that many ratios give the same; published
  ones are simple.

  Args:
    hidden: features that were found, at least one.
    features: hidden features that a ratio gives; at least ratio / 2, and no
      fewer for a greater ratio.
  """
  for denominator in itertools.count(1):
    numerator = bisect.bisect_left(
      range(2 * hidden * denominator + 2),
      hidden,
      key=lambda n: features(n / denominator),
    )
    if features(numerator / denominator) == hidden:
      return numerator / denominator


def export(params: Params, rows: list[Row]) -> dict[str, Any]:
  """Published names and layouts of `params`, or of any tree shaped like it.

  Raises:
    KeyError: parameters that no row names.
  """
  flat = flatten(params)
  named: dict[str, Any] = {}
  for row in rows:
    array = flat.pop(row.ours)
    if "{}" in row.theirs:
      for i in range(array.shape[0]):
        named[row.theirs.format(i)] = row.layout.out(array[i])
    else:
      named[row.theirs] = row.layout.out(array)
  if flat:
    raise KeyError(f"no row for {sorted(flat)}")
  return named


def restore(
  state_dict: Mapping[str, Any],
  rows: list[Row],
  abstract: Params,
  buffers: Mapping[str, tuple[int, ...]],
) -> Params:
  """Our parameters, float32, from a published state dict.

  Args:
    state_dict: arrays by published name; every key is accounted for.
    rows: the table of the network.
    abstract: our parameters as `ShapeDtypeStruct`s.
    buffers: shapes of the entries that are no parameters.

  Raises:
    ConfigError: names that are missing, unexpected or misshapen, all of them.
  """
  wanted = jax.eval_shape(lambda p: export(p, rows), abstract)
  shapes = {name: a.shape for name, a in wanted.items()} | dict(buffers)
  check_names(state_dict, shapes)
  flat = flatten(abstract)
  params: Params = {}
  for row in rows:
    stacked = "{}" in row.theirs
    layers = flat[row.ours].shape[0] if stacked else 1
    names = [row.theirs.format(i) for i in range(layers)]
    shape = flat[row.ours].shape[1 if stacked else 0 :]
    arrays = [
      row.layout.back(np.asarray(state_dict[name], np.float32)).reshape(shape)
      for name in names
    ]
    *path, leaf = row.ours.split(".")
    node = params
    for part in path:
      node = node.setdefault(part, {})
    node[leaf] = jnp.asarray(np.stack(arrays) if stacked else arrays[0])
  return params


def check_names(
  state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises ConfigError unless there are just these names and shapes."""
  misshapen = [
    f"{name} {np.shape(state_dict[name])} instead of {tuple(shape)}"
    for name, shape in shapes.items()
    if name in state_dict and np.shape(state_dict[name]) != tuple(shape)
  ]
  faults = {
    "missing": sorted(shapes.keys() - state_dict.keys()),
    "unexpected": sorted(state_dict.keys() - shapes.keys()),
    "misshapen": misshapen,
  }
  if any(faults.values()):
    raise ConfigError(
      "published weights do not fit this network: "
      + "; ".join(f"{k}: {_some(v)}" for k, v in faults.items() if v)
    )


def _some(names: list[str], limit: int = 20) -> str:
  rest = len(names) - limit
  return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
