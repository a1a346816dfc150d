"""Orbax checkpoints: the one module that knows how runs are stored.

A run keeps `WORKDIR/checkpoints/STEP/`, each with the train state and the full
config, and beside them `config.json`, the config of its latest launch, and
`data.json`, what tells its data from other data. Saving is asynchronous. Where
the newest checkpoint cannot be read, the newest good one is used. Weights alone
make a run too: a checkpoint that holds only averages.
"""

import itertools
import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from arflow_jax.training import listing, relayout
from arflow_jax.training.state import TrainState

_keep = ocp.training.preservation_policies


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


class Checkpoints:
  """Writes the checkpoints of one run and restores the newest good one.

  Args:
    workdir: the run's directory.
    config: the full config; `config.checkpoint` says what is kept.
  """

  def __init__(self, workdir: str, config: ConfigDict):
    self._workdir, self._config = workdir, config
    policies = [_keep.LatestN(config.checkpoint.keep)]
    if config.checkpoint.keep_every:
      policies.append(_keep.EveryNSteps(config.checkpoint.keep_every))
    self._policy = _keep.AnyPreservationPolicy(policies)
    self._writer = None

  def restore(
    self, abstract: TrainState, begin: Callable[[Any], TrainState]
  ) -> TrainState | None:
    """The newest good train state, or None where none was ever saved.

    Newer checkpoints that cannot be read are set aside under another name, so
    that training can write their steps again and nothing is lost.

    Args:
      abstract: shapes, types and shardings to restore into.
      begin: makes a fresh train state of the weights it is given, for a run
        that has nothing but weights.

    Raises:
      ConfigError: there are checkpoints, but none can be read.
    """

    def load(path: epath.Path) -> TrainState:
      if "optimizer" in _metadata(path):
        return TrainState(**_named(_load(path, _stored(abstract))))
      return begin(_load(path, {"ema": abstract.ema})["ema"])

    if not listing.steps(self._workdir):
      return None
    state, _, bad = listing.newest_good(self._workdir, load)
    for newer in bad:
      listing.set_aside(listing.folder(self._workdir) / str(newer))
    return state

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving; returns as soon as the arrays are copied."""
    if self._writer is None:
      self._writer = ocp.training.Checkpointer(
        listing.folder(self._workdir, make=True),
        preservation_policy=self._policy,
      )
    self._writer.save_checkpointables_async(
      step,
      {"state": _stored(state), "config": _plain(self._config)},
      force=True,  # or Orbax skips a save while the one before is written
    )

  def close(self) -> None:
    """Waits until everything is on disk."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None


def keep_config(workdir: str, config: ConfigDict) -> None:
  """Writes the config of a launch to `WORKDIR/config.json`."""
  _keep_text(workdir, "config.json", config_lib.dumps(config))


def check_data(workdir: str, found: dict[str, Any]) -> None:
  """Refuses other data than a run began with, in `WORKDIR/data.json`.

  Keeps `found` there where the run has none: a run of an earlier version, or
  one that has no checkpoint yet and may begin with any data.

  Args:
    workdir: the run's directory.
    found: what `data.sources.fingerprint` returned.

  Raises:
    ConfigError: the run began with other data.
  """
  path = listing.folder(workdir).parent / "data.json"
  now = list(zip(found["classes"], found["images"]))
  was = None
  if path.exists() and listing.steps(workdir):
    try:
      kept = json.loads(path.read_text())
      was = list(zip(kept["classes"], kept["images"]))
    except (ValueError, KeyError, TypeError):
      logging.warning("%s is damaged: it is written anew", path)
  if was is None:
    _keep_text(workdir, "data.json", json.dumps(found))
  elif was != now:
    pairs = itertools.zip_longest(was, now)
    old, new = next((a, b) for a, b in pairs if a != b)
    raise ConfigError(
      f"data.dir holds other data than {workdir} began with: of its classes"
      f" (name, images) the first that differs is {new}, was {old}; give the"
      " data.dir of that data, or choose another --workdir"
    )


def _keep_text(workdir: str, name: str, text: str) -> None:
  """Writes a file of a run, as a whole, from one process."""
  if not processes.speaks():
    return
  folder = listing.folder(workdir).parent
  folder.mkdir(parents=True, exist_ok=True)
  part = folder / f"{name}.part"
  part.write_text(text + "\n")
  part.replace(folder / name)


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
    config = listing.load_config(path)
    return config, _load(path, {"ema": abstract(config)})["ema"]

  (config, params), step, _ = listing.newest_good(workdir, load)
  return Weights(_with_latest(config, workdir), params, step)


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
  ocp.save_checkpointables(
    listing.folder(workdir, make=True) / "0",
    {"state": {"ema": params}, "config": _plain(config)},
  )
  keep_config(workdir, config)


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


def _plain(config: ConfigDict) -> dict[str, Any]:
  return json.loads(config_lib.dumps(config))


def _load(path: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
  """Some parts of a stored state, whatever layout they were stored in."""
  read = relayout.as_stored(wanted, _metadata(path))
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    loaded = ocp.load_checkpointables(path, {"state": read})["state"]
  return relayout.as_wanted(loaded, wanted)


def _metadata(path: epath.Path) -> dict[str, Any]:
  return ocp.metadata(path, "state").metadata


def _with_latest(config: ConfigDict, workdir: str) -> ConfigDict:
  path = listing.folder(workdir).parent / "config.json"
  if not path.exists():  # a run of an earlier version
    return config
  try:
    return config_lib.with_free(config, config_lib.loads(path.read_text()))
  except (ValueError, TypeError, AttributeError) as error:
    logging.warning("%s is not used, it is damaged (%s)", path, error)
    return config
