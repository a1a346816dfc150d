"""Which checkpoints a run has, and the newest that can be read.

Orbax tells complete from unfinished in the way of the file system. What cannot
be read is left alone here; only a trainer sets it aside.
"""

import logging
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes


def folder(workdir: str, *, make: bool = False) -> epath.Path:
  """The folder of a run's checkpoints; made by one process, if at all."""
  path = epath.Path(workdir)
  if not path.is_absolute():  # `resolve` makes a local folder of gs://
    path = path.resolve()
  found = path / "checkpoints"
  if make and processes.speaks():
    found.mkdir(parents=True, exist_ok=True)
  return found


def steps(workdir: str) -> list[int]:
  """Steps that have a complete checkpoint, ascending.

  Orbax tells complete from unfinished in the way of the file system: by the
  name of the folder, or by a file in it where folders cannot be renamed.
  """
  where = folder(workdir)
  if not where.is_dir():
    return []
  found = ocp.path.step.standard_name_format().find_all(where)
  return sorted(checkpoint.step for checkpoint in found)


def read_config(workdir: str) -> ConfigDict:
  """The config stored with the newest readable checkpoint of a run.

  Raises:
    ConfigError: no run there, or none of its checkpoints can be read.
  """
  return newest_good(workdir, load_config)[0]


def load_config(path: epath.Path) -> ConfigDict:
  """The config of one checkpoint, with the keys that came after it."""
  stored = ocp.load_checkpointables(path, {"config": None})["config"]
  return config_lib.complete(
    stored, branches.family(stored["branch"]).added_keys
  )


def newest_good(
  workdir: str, load: Callable[[epath.Path], Any]
) -> tuple[Any, int, list[int]]:
  """What `load` makes of the newest checkpoint that it can read.

  Returns:
    That, the step, and the newer steps that could not be read.

  Raises:
    ConfigError: no checkpoint, or none that can be read.
  """
  where = folder(workdir)
  while True:
    listed = steps(workdir)
    bad, reason = [], ""
    for step in reversed(listed):
      try:
        loaded = jax.block_until_ready(load(where / str(step)))
      except ConfigError:
        raise  # the checkpoint is sound, what is asked of it is not
      except Exception as error:  # Orbax and tensorstore raise many kinds
        if not (where / str(step)).exists():
          continue  # a training run has removed it in the meantime
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logging.warning(
          "checkpoint %s cannot be read (%s); trying the one before",
          where / str(step),
          reason,
        )
        bad.append(step)
      else:
        return loaded, step, bad
    if steps(workdir) == listed:  # else training has moved on: look again
      break
  if not bad:
    raise ConfigError(
      f"--workdir={workdir} holds no checkpoint; train a model there first"
    )
  raise ConfigError(
    f"none of the checkpoints in {where} can be read (steps {bad[::-1]};"
    f" {reason}); restore one from a copy or choose another --workdir"
  )


def set_aside(path: epath.Path) -> None:
  """Gives an unreadable checkpoint a name under which it is none."""
  if not processes.speaks():
    return
  aside = path.with_name(f"{path.name}.unreadable")
  suffix = 0
  while aside.exists():
    suffix += 1
    aside = path.with_name(f"{path.name}.unreadable{suffix}")
  path.rename(aside)
  logging.warning("set aside as %s", aside)
