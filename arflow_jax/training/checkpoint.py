"""Orbax checkpoints: the one module that knows how runs are stored.

A run keeps `WORKDIR/checkpoints/STEP/`, each with the train state and the full
config. Saving is asynchronous; a step directory appears only when complete. If
the newest one cannot be read all the same, the newest good one is used.
"""

import json
import logging
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.training.state import TrainState

_keep = ocp.training.preservation_policies
_FOLDER = "checkpoints"


class Checkpoints:
  """Writes the checkpoints of one run and restores the newest good one.

  Args:
    workdir: the run's directory.
    config: the full config; `config.checkpoint` says what is kept.
  """

  def __init__(self, workdir: str, config: ConfigDict):
    self._folder = pathlib.Path(workdir).absolute() / _FOLDER
    self._config = config
    policies = [_keep.LatestN(config.checkpoint.keep)]
    if config.checkpoint.keep_every:
      policies.append(_keep.EveryNSteps(config.checkpoint.keep_every))
    self._policy = _keep.AnyPreservationPolicy(policies)
    self._writer = None

  def restore(self, abstract: TrainState) -> TrainState | None:
    """The newest good train state, or None where none was ever saved.

    Newer checkpoints that cannot be read are set aside under another name, so
    that training can write their steps again and nothing is lost.

    Args:
      abstract: shapes, types and shardings to restore into.

    Raises:
      ConfigError: there are checkpoints, but none can be read.
    """
    found = _newest_good(
      self._folder.parent,
      lambda path: ocp.load_checkpointables(path, {"state": abstract})["state"],
    )
    if found is None:
      return None
    state, _, bad = found
    for newer in bad:
      path = self._folder / str(newer)
      aside = path.with_name(f"{newer}.unreadable")
      suffix = 0
      while aside.exists():
        suffix += 1
        aside = path.with_name(f"{newer}.unreadable{suffix}")
      path.rename(aside)
      logging.warning("set aside as %s", aside)
    return state

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving; returns as soon as the arrays are copied."""
    if self._writer is None:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._writer = ocp.training.Checkpointer(
        self._folder, preservation_policy=self._policy
      )
    self._writer.save_checkpointables_async(
      step,
      {"state": state, "config": json.loads(config_lib.dumps(self._config))},
      force=True,  # or Orbax skips a save while the one before is written
    )

  def close(self) -> None:
    """Waits until everything is on disk."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None


def steps(workdir: str | pathlib.Path) -> list[int]:
  """Steps that have a complete checkpoint, ascending."""
  folder = pathlib.Path(workdir) / _FOLDER
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def read_config(workdir: str) -> ConfigDict:
  """The config stored with the newest readable checkpoint of a run.

  Raises:
    ConfigError: no run there, or none of its checkpoints can be read.
  """
  found = _newest_good(
    workdir,
    lambda path: ocp.load_checkpointables(path, {"config": None})["config"],
  )
  if found is None:
    raise ConfigError(
      f"--workdir={workdir} holds no checkpoint; train a model there first"
    )
  return ConfigDict(found[0]).lock()


def restore_ema(workdir: str, abstract: Any) -> tuple[Any, int]:
  """Only the averaged weights of the newest good checkpoint, and its step.

  Args:
    workdir: the run's directory; training may go on in it.
    abstract: shapes, types and shardings of the weights.

  Raises:
    ConfigError: no run there, or none of its checkpoints can be read.
  """
  context = ocp.Context()
  context.pytree.loading.partial_load = True

  def load(path):
    with context:
      wanted = {"state": {"ema": abstract}}
      return ocp.load_checkpointables(path, wanted)["state"]["ema"]

  found = _newest_good(workdir, load)
  if found is None:
    raise ConfigError(
      f"--workdir={workdir} holds no checkpoint; train a model there first"
    )
  return found[0], found[1]


def _newest_good(workdir, load):
  """Returns (loaded, its step, newer unreadable steps), None without any."""
  folder = pathlib.Path(workdir).absolute() / _FOLDER
  while True:
    listed = steps(workdir)
    bad, reason = [], ""
    for step in reversed(listed):
      try:
        loaded = jax.block_until_ready(load(folder / str(step)))
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
