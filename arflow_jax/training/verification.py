"""Reads all that a run has stored, to find damage before it is needed."""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from arflow_jax import config as config_lib
from arflow_jax import paths
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import agreement, processes
from arflow_jax.training import checksum, echoes, listing, relayout


def verify(workdir: str) -> bool:
  """Says of every part of a run whether it is good; changes nothing.

  One process of a job reads, the others wait for it.

  Returns:
    Whether all is good.

  Raises:
    ConfigError: no run there.
  """
  processes.start()
  return agreement.by_one(lambda: _verify(workdir))


def _verify(workdir: str) -> bool:
  paths.check_bucket("--workdir", workdir)
  steps = listing.steps(workdir)
  if not steps:
    raise ConfigError(
      f"--workdir={workdir} holds no checkpoint; train a model there first"
    )
  bad = []
  for step in steps:
    path = listing.folder(workdir) / str(step)
    found = list(damage(path))
    if not path.exists():  # training has removed it in the meantime
      continue
    for line in found or [_praise(path)]:
      processes.say(f"checkpoint {step}: {line}")
    bad += [step] * bool(found)
  if bad:
    good = [step for step in steps if step not in bad]
    processes.say(
      f"damaged checkpoints: {bad}; training and sampling use the newest good"
      f" one, {good[-1] if good else 'but there is none'}"
    )
  files = [
    f"{name}: {why}"
    for name in ("config.json", "data.json", "metrics.jsonl")
    if (why := _unreadable(listing.folder(workdir).parent / name))
  ]
  for line in files:
    processes.say(line)
  return not bad and not files


def damage(path: epath.Path) -> Iterator[str]:
  """What of a checkpoint cannot be read, or is not what was written.

  Reads everything into the memory of the host: one after the other the
  parameters, their averages and the optimiser's state.

  Args:
    path: of the checkpoint.

  Yields:
    A line for each such part.
  """
  try:
    about = listing.about(path)
    with echoes.dropped():
      listing.load_config(path)
    stored = listing.arrays(path)
  except Exception as error:  # Orbax and tensorstore raise many kinds
    yield listing.reason(error)
    return
  sums = about.get("arrays", {})
  names = {
    "/".join(relayout.name(place)): place
    for place, _ in jax.tree_util.tree_leaves_with_path(stored)
  }

  def wrong(chosen: list[str]) -> str:
    """What is wrong with some arrays that are read together."""
    try:
      arrays = _read(path, stored, {names[name] for name in chosen})
      found = checksum.of(dict(zip(chosen, arrays)))
    except Exception as error:
      return listing.reason(error)
    bad = about and any(found[name] != sums.get(name) for name in chosen)
    return "its checksum differs" if bad else ""

  for _, part in itertools.groupby(names, lambda name: name.partition("/")[0]):
    part = list(part)
    if wrong(part):  # then one by one
      yield from (f"{x}: {why}" for x in part if (why := wrong([x])))
  for name in sorted(sums.keys() - names.keys()):
    yield f"{name}: it is missing"


def _read(path: epath.Path, stored: Any, places: set[Any]) -> list[jax.Array]:
  """Some arrays of a checkpoint, on the host."""
  host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

  def wanted(place, leaf):
    if place not in places:
      return ocp.PLACEHOLDER
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)

  tree = jax.tree_util.tree_map_with_path(wanted, stored)
  with echoes.dropped(), listing.reading():
    loaded = ocp.load_checkpointables(path, {"state": tree})["state"]
  return [x for x in jax.tree.leaves(loaded) if x is not ocp.PLACEHOLDER]


def _praise(path: epath.Path) -> str:
  leaves = jax.tree.leaves(listing.arrays(path))
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
  what = "good" if listing.about(path) else "readable; it has no checksums"
  return f"{what} ({len(leaves)} arrays, {size / 1e6:,.1f} MB)"


def _unreadable(path: epath.Path) -> str:
  """Why a file of JSON cannot be read; empty if it can, or is not there."""
  try:
    if path.suffix == ".jsonl":
      # What a crash cut off of the last line the next launch removes.
      for line in path.read_text().splitlines()[:-1]:
        json.loads(line)
    else:
      config_lib.loads(path.read_text())
  except FileNotFoundError:
    return ""
  except (OSError, ValueError) as error:
    return listing.reason(error)
  return ""
