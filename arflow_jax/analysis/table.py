"""The table of all published sizes on four slices, as Markdown.

  python -m arflow_jax.analysis.table [X.json ...]

Bytes of one device are by the formula of `footprint`, and FLOPs are counted.
Each X.json is what preflight kept with --out: where its config, batch, types
and slice are those of a cell, the cell is what was compiled.
"""

import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import console
from arflow_jax.analysis import chips, flops, footprint

SLICES = ("v5e:16x16", "v6e:16x16", "v5p:4x4x8", "tpu7x:4x4x4")
_ARFLOW = "configs/arflow.py:imagenet{}-{}{}-pod"
_FLOWAR = "configs/flowar.py:imagenet256-{}-pod"


def configs() -> Iterator[tuple[str, ConfigDict]]:
  """Name and config of every row."""
  sizes = itertools.product((128, 256), ("s", "b", "l", "xl"), (2, 4, 8))
  for size in sizes:
    yield _of(_ARFLOW.format(*size))
  for size in ("s", "l", "h"):
    yield _of(_FLOWAR.format(size))


def _of(name: str) -> tuple[str, ConfigDict]:
  family, variant = name.removeprefix("configs/").split(".py:")
  shown = variant.removesuffix("-pod")
  return f"{family} {shown}", config_lib.from_file(name)


def row(name: str, config: ConfigDict, kept: list[dict[str, Any]]) -> str:
  """One line of the table.

  Args:
    name: its first cell.
    config: what it is about.
    kept: what preflight found of configs, this one among them or not.
  """
  weights = footprint.checkpoint(config) / 16  # with average and two moments
  cells = [f"{name:22}", f"{weights / 1e6:>5,.0f}", f"{config.model.remat:>5}"]
  cells.append(f"{flops.train_step(config) / 1e12:>7,.1f}")
  cells += [f"{_cell(config, chips.parse(s), kept):>6}" for s in SLICES]
  return f"| {' | '.join(cells)} |"


def _cell(
  config: ConfigDict, place: chips.Slice, kept: list[dict[str, Any]]
) -> str:
  """GiB of one device, and whether they are there."""
  for found in kept:
    if found["topology"] == place.name and _alike(found["config"], config):
      return _verdict(found["needed"], found["fits"]) + " c"
  total = footprint.divide(config, place.devices, tpu=True)["total"]
  return _verdict(total, total <= place.hbm)


def _verdict(needed: int, fits: bool) -> str:
  size = f"{needed / 2**30:,.2f}"
  return size if fits else f"no: {size}"


def _alike(found: dict[str, Any], config: ConfigDict) -> bool:
  """Whether a kept config takes the same bytes."""
  mine = config.to_dict()
  same = ("branch", "batch_size", "model", "mesh", "optimizer")
  return all(json.dumps(found[key]) == json.dumps(mine[key]) for key in same)


def lines(kept: list[dict[str, Any]]) -> Iterator[str]:
  """The table, line by line."""
  head = ["config", "M", "remat", "TFLOPs", *SLICES]
  yield f"| {' | '.join(head)} |"
  yield f"|---|{'---:|' * (len(head) - 1)}"
  for name, config in configs():
    yield row(name, config, kept)


def main(paths: list[str]) -> None:
  kept = [json.loads(pathlib.Path(path).read_text()) for path in paths]
  for line in lines(kept):
    console.say(line)


if __name__ == "__main__":
  main(sys.argv[1:])
