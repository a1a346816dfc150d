"""Orbax checkpoints: the one module that knows how runs are stored.

A run keeps `WORKDIR/checkpoints/STEP/`, each with the train state and the full
config, and `WORKDIR/config.json`, the config of its latest launch. Saving is
asynchronous. Where the newest checkpoint cannot be read, the newest good one is
used. Weights alone make a run too: a checkpoint that holds only averages.
"""

import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from arflow_jax.training import relayout
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

    found = _newest_good(self._workdir, load)
    if found is None:
      return None
    state, _, bad = found
    for newer in bad:
      _set_aside(_folder(self._workdir) / str(newer))
    return state

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving; returns as soon as the arrays are copied."""
    if self._writer is None:
      self._writer = ocp.training.Checkpointer(
        _folder(self._workdir, make=True), preservation_policy=self._policy
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


def steps(workdir: str) -> list[int]:
  """Steps that have a complete checkpoint, ascending.

  Orbax tells complete from unfinished in the way of the file system: by the
  name of the folder, or by a file in it where folders cannot be renamed.
  """
  folder = _folder(workdir)
  if not folder.is_dir():
    return []
  found = ocp.path.step.standard_name_format().find_all(folder)
  return sorted(checkpoint.step for checkpoint in found)


def read_config(workdir: str) -> ConfigDict:
  """The config stored with the newest readable checkpoint of a run.

  Raises:
    ConfigError: no run there, or none of its checkpoints can be read.
  """
  return _required(_newest_good(workdir, _load_config), workdir)[0]


def keep_config(workdir: str, config: ConfigDict) -> None:
  """Writes the config of a launch to `WORKDIR/config.json`."""
  if not processes.speaks():
    return
  folder = _folder(workdir).parent
  folder.mkdir(parents=True, exist_ok=True)
  part = folder / "config.json.part"
  part.write_text(config_lib.dumps(config) + "\n")
  part.replace(folder / "config.json")


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
    config = _load_config(path)
    return config, _load(path, {"ema": abstract(config)})["ema"]

  found = _required(_newest_good(workdir, load), workdir)
  (config, params), step, _ = found
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
  if found := steps(workdir):
    raise ConfigError(
      f"--workdir={workdir} holds a run already (checkpoints of steps {found});"
      " choose another"
    )
  keep_config(workdir, config)
  ocp.save_checkpointables(
    _folder(workdir, make=True) / "0",
    {"state": {"ema": params}, "config": _plain(config)},
  )


def _folder(workdir: str, *, make: bool = False) -> epath.Path:
  """The folder of a run's checkpoints; made by one process, if at all."""
  path = epath.Path(workdir)
  if not path.is_absolute():  # `resolve` makes a local folder of gs://
    path = path.resolve()
  folder = path / "checkpoints"
  if make and processes.speaks():
    folder.mkdir(parents=True, exist_ok=True)
  return folder


def _stored(state: TrainState) -> dict[str, Any]:
  """The names of the parts on disk, which never change."""
  return {
    "step": state.step,
    "params": state.params,
    "ema": state.ema,
    "optimizer": state.opt_state,
  }


def _named(stored: dict[str, Any]) -> dict[str, Any]:
  stored = dict(stored)
  return stored | {"opt_state": stored.pop("optimizer")}


def _plain(config: ConfigDict) -> dict[str, Any]:
  return json.loads(config_lib.dumps(config))


def _load(path: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
  """Some parts of a stored state, whatever layout they were stored in."""
  stored = _metadata(path)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    loaded = ocp.load_checkpointables(
      path, {"state": relayout.as_stored(wanted, stored)}
    )["state"]
  return relayout.as_wanted(loaded, wanted)


def _metadata(path: epath.Path) -> dict[str, Any]:
  return ocp.metadata(path, "state").metadata


def _load_config(path: epath.Path) -> ConfigDict:
  stored = ocp.load_checkpointables(path, {"config": None})["config"]
  return config_lib.complete(
    stored, branches.family(stored["branch"]).added_keys
  )


def _with_latest(config: ConfigDict, workdir: str) -> ConfigDict:
  path = _folder(workdir).parent / "config.json"
  if not path.exists():  # a run of an earlier version
    return config
  try:
    return config_lib.with_free(config, config_lib.loads(path.read_text()))
  except (ValueError, TypeError, AttributeError) as error:
    logging.warning("%s is not used, it is damaged (%s)", path, error)
    return config


def _set_aside(path: epath.Path) -> None:
  if not processes.speaks():
    return
  aside = path.with_name(f"{path.name}.unreadable")
  suffix = 0
  while aside.exists():
    suffix += 1
    aside = path.with_name(f"{path.name}.unreadable{suffix}")
  path.rename(aside)
  logging.warning("set aside as %s", aside)


def _required(found: Any, workdir: str) -> Any:
  if found is None:
    raise ConfigError(
      f"--workdir={workdir} holds no checkpoint; train a model there first"
    )
  return found


def _newest_good(
  workdir: str, load: Callable[[epath.Path], Any]
) -> tuple[Any, int, list[int]] | None:
  """Returns (loaded, its step, newer unreadable steps), None without any."""
  folder = _folder(workdir)
  while True:
    listed = steps(workdir)
    bad, reason = [], ""
    for step in reversed(listed):
      try:
        loaded = jax.block_until_ready(load(folder / str(step)))
      except ConfigError:
        raise  # the checkpoint is sound, what is asked of it is not
      except Exception as error:  # Orbax and tensorstore raise many kinds
        if not (folder / str(step)).exists():
          continue  # a training run has removed it in the meantime
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logging.warning(
          "checkpoint %s cannot be read (%s); trying the one before",
          folder / str(step),
          reason,
        )
        bad.append(step)
      else:
        return loaded, step, bad
    if steps(workdir) == listed:  # else training has moved on: look again
      break
  if bad:
    raise ConfigError(
      f"none of the checkpoints in {folder} can be read (steps {bad[::-1]};"
      f" {reason}); restore one from a copy or choose another --workdir"
    )
  return None
