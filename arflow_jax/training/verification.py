"""Reads all that a run has stored, to find damage before it is needed."""

import json
import math
from collections.abc import Iterator

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from arflow_jax.training import checksum, echoes, listing, relayout


def verify(workdir: str) -> bool:
  """Says of every part of a run whether it is good; changes nothing.

  Returns:
    Whether all is good.

  Raises:
    ConfigError: no run there.
  """
  steps = listing.steps(workdir)
  if not steps:
    raise ConfigError(
      f"--workdir={workdir} holds no checkpoint; train a model there first"
    )
  bad = 0
  for step in steps:
    path = listing.folder(workdir) / str(step)
    found = list(damage(path))
    for line in found or [_praise(path)]:
      processes.say(f"checkpoint {step}: {line}")
    bad += bool(found)
  for name in ("config.json", "data.json", "metrics.jsonl"):
    if found := _unreadable(listing.folder(workdir).parent / name):
      processes.say(f"{name}: {found}")
      bad += 1
  if bad:
    processes.say(
      "damaged; training goes on from the newest good checkpoint, and sets"
      " newer ones aside"
    )
  return not bad


def damage(path: epath.Path) -> Iterator[str]:
  """What of a checkpoint cannot be read, or is not what was written.

  Reads everything into the memory of the host, an array at a time.

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
  names = set()
  for place, _ in jax.tree_util.tree_leaves_with_path(stored):
    name = "/".join(relayout.name(place))
    names.add(name)
    try:
      array = _read(path, stored, place)
      if about and checksum.of({name: array}) != {name: sums.get(name)}:
        yield f"{name}: its checksum differs"
    except Exception as error:
      yield f"{name}: {listing.reason(error)}"
  for name in sorted(sums.keys() - names):
    yield f"{name}: it is missing"


def _read(path: epath.Path, stored, place) -> jax.Array:
  """One array of a checkpoint, on the host."""
  host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])

  def wanted(other, leaf):
    if other != place:
      return ocp.PLACEHOLDER
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)

  tree = jax.tree_util.tree_map_with_path(wanted, stored)
  with echoes.dropped():
    loaded = ocp.load_checkpointables(path, {"state": tree})["state"]
  return next(x for x in jax.tree.leaves(loaded) if x is not ocp.PLACEHOLDER)


def _praise(path: epath.Path) -> str:
  leaves = jax.tree.leaves(listing.arrays(path))
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
  what = "good" if listing.about(path) else "readable; it has no checksums"
  return f"{what} ({len(leaves)} arrays, {size / 1e6:,.1f} MB)"


def _unreadable(path: epath.Path) -> str:
  """Why a file of JSON cannot be read; empty if it can, or is not there."""
  try:
    if path.suffix == ".jsonl":
      for line in path.read_text().splitlines():
        json.loads(line)
    else:
      config_lib.loads(path.read_text())
  except FileNotFoundError:
    return ""
  except (OSError, ValueError) as error:
    return listing.reason(error)
  return ""
