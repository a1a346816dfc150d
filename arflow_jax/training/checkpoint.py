"""Orbax checkpoints: the one module that knows what they hold.

A run keeps `WORKDIR/checkpoints/STEP/`, each with the train state, the full
config, and a checksum of everything, which is verified whenever something is
read. Where the newest checkpoint cannot be read, the newest good one is used.
Weights alone make a run too: a checkpoint that holds only averages.
"""

import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from arflow_jax.parallel.agreement import by_one, together
from arflow_jax.training import (
  checksum,
  listing,
  newest,
  relayout,
  run_files,
)
from arflow_jax.training.state import TrainState


class Weights(NamedTuple):
  """What a run is sampled with: the contents of one checkpoint.

  Attributes:
    config: of the run, with the free keys of its latest launch.
    params: averaged weights.
    step: optimiser steps done.
  """

  config: ConfigDict
  params: Any
  step: int


class Contents(NamedTuple):
  """What Orbax is given to store.

  Attributes:
    items: the parts of a checkpoint, by name.
    about: what `listing.about` returns: metadata that JSON can hold.
  """

  items: dict[str, Any]
  about: dict[str, Any]


def contents(
  state: TrainState, config: ConfigDict, window: dict[str, float]
) -> Contents:
  """A whole train state as it is stored.

  Args:
    state: the train state.
    config: the full config.
    window: sums of the metrics since the last record.
  """
  return _contents(_stored(state), config, window)


def restore(
  workdir: str, abstract: TrainState, begin: Callable[[Any], TrainState]
) -> tuple[TrainState, dict[str, float]] | None:
  """The newest good train state, or None where none was ever saved.

  Newer checkpoints that cannot be read are set aside under another name, so
  that training can write their steps again and nothing is lost.

  Args:
    workdir: the run's directory.
    abstract: shapes, types and shardings to restore into.
    begin: makes a fresh train state of the weights it is given, for a run
      that has nothing but weights.

  Returns:
    The state, and the `window` that it was stored with.

  Raises:
    ConfigError: there are checkpoints, but none can be read.
  """

  def load(path: epath.Path) -> tuple[TrainState, dict[str, float]]:
    together(lambda: listing.load_config(path))  # without it, of no use
    about, stored = together(
      lambda: (listing.about(path), listing.arrays(path))
    )
    if "optimizer" in stored:
      state = TrainState(**_named(_load(path, _stored(abstract))))
    else:
      state = begin(_load(path, {"ema": abstract.ema})["ema"])
    return state, about.get("window", {})

  if not listing.agreed_steps(workdir):
    return None
  found, _, bad = newest.newest_good(workdir, load)
  folder = listing.folder(workdir)
  by_one(lambda: [listing.set_aside(folder / str(newer)) for newer in bad])
  return found


def load_weights(
  workdir: str, abstract: Callable[[ConfigDict], Any]
) -> Weights:
  """Config and averaged weights of the newest good checkpoint.

  Args:
    workdir: the run's directory; training may go on in it.
    abstract: from the config, shapes, types and shardings of the weights.

  Raises:
    ConfigError: no run there, or none of its checkpoints can be read.
  """

  def load(path: epath.Path) -> tuple[ConfigDict, Any]:
    config = together(lambda: listing.load_config(path))
    return config, _load(path, {"ema": abstract(config)})["ema"]

  (config, params), step, _ = newest.newest_good(workdir, load)
  return Weights(run_files.with_latest(config, workdir), params, step)


def save_weights(workdir: str, config: ConfigDict, params: Any) -> None:
  """Makes a run of weights alone, at step 0: to sample from, or to train on.

  Args:
    workdir: a directory without a run.
    config: the full config of the network.
    params: its weights.

  Raises:
    ConfigError: a run is there already.
  """
  if found := listing.steps(workdir):
    raise ConfigError(
      f"--workdir={workdir} holds a run already (checkpoints of steps {found});"
      " choose another"
    )
  items, about = _contents({"ema": params}, config, {})
  ocp.save_checkpointables(
    listing.folder(workdir, make=True) / "0", items, custom_metadata=about
  )
  run_files.keep_config(workdir, config)


def _contents(
  stored: dict[str, Any], config: ConfigDict, window: dict[str, float]
) -> Contents:
  plain = json.loads(config_lib.dumps(config))
  about = {
    "format": listing.FORMAT,
    "window": dict(window),  # written later, when there are more steps in it
    "config": checksum.digest(plain),
    "arrays": checksum.of(stored),
  }
  return Contents({"state": stored, "config": plain}, checksum.seal(about))


def _stored(state: TrainState) -> dict[str, Any]:
  """The names of the parts on disk, which never change."""
  return {
    "step": state.step,
    "params": state.params,
    "ema": state.ema,
    "optimizer": state.opt_state,
  }


def _named(parts: dict[str, Any]) -> dict[str, Any]:
  parts = dict(parts)
  return parts | {"opt_state": parts.pop("optimizer")}


def _load(path: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
  """Some parts of a stored state, whatever layout they were stored in.

  Raises:
    Damaged: a part is not what was written.
  """
  about, stored = together(
    lambda: (
      listing.about(path),
      relayout.as_stored(wanted, listing.arrays(path)),
    )
  )

  def read():
    context = listing.reading()
    context.pytree.loading.partial_load = True
    with context:
      found = ocp.load_checkpointables(path, {"state": stored})["state"]
    return jax.block_until_ready(found)

  loaded = together(read)
  if about:
    checksum.check(loaded, about["arrays"])
  elif processes.speaks():
    logging.warning(
      "%s is of an earlier version, which wrote no checksums: it is restored as"
      " it is",
      path,
    )
  return relayout.as_wanted(loaded, wanted)
