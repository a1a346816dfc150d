"""Which checkpoints a run has, what they tell of themselves, the newest good.

Orbax tells complete from unfinished in the way of the file system. What cannot
be read is left alone here; only a trainer sets it aside.
"""

import errno
import json
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax import branches, paths
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from arflow_jax.training import checksum, echoes
from arflow_jax.training.checksum import Damaged

PAUSES = (1.0, 5.0)  # seconds before a failed read or save is tried again
# Of what a checkpoint holds: 1 had no checksums.
FORMAT = 2
# How tensorstore names what is no fault of a file.
_OF_THE_WORLD = (
  "RESOURCE_EXHAUSTED",
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
  "PERMISSION_DENIED",
  "UNAUTHENTICATED",
  "ABORTED",
  "CANCELLED",
)
# What tensorstore and Orbax raise where files are not what they should be.
_OF_FILES = (
  Damaged,
  FileNotFoundError,
  NotADirectoryError,
  ValueError,
  KeyError,
  TypeError,
  EOFError,
)


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
  with echoes.dropped():
    found = ocp.path.step.standard_name_format().find_all(where)
    return sorted(checkpoint.step for checkpoint in found)


def read_config(workdir: str) -> ConfigDict:
  """The config stored with the newest readable checkpoint of a run.

  Raises:
    ConfigError: no run there, or none of its checkpoints can be read.
  """
  return newest_good(workdir, load_config)[0]


def load_config(path: epath.Path) -> ConfigDict:
  """The config of one checkpoint, with the keys that came after it.

  Raises:
    Damaged: it is not what was written.
  """
  told = about(path)
  stored = ocp.load_checkpointables(path, {"config": None})["config"]
  if told and told["config"] != checksum.digest(stored):
    raise Damaged("the checksum of the config differs")
  return config_lib.complete(
    stored, branches.family(stored["branch"]).added_keys
  )


def arrays(path: epath.Path) -> dict[str, Any]:
  """The tree of the shapes and types of the state that is stored."""
  with echoes.dropped() as heard:
    found = ocp.metadata(path, "state").metadata
  if found is None:  # Orbax has but logged the reason
    raise ValueError(
      heard[-1].rpartition("Error details: ")[2] if heard else ""
    )
  return found


def about(path: epath.Path) -> dict[str, Any]:
  """What a checkpoint tells of itself; empty where its format is 1.

  Returns:
    `format`, `window` (see `checkpoint.contents`), and checksums: `config`,
    and `arrays` by name.

  Raises:
    Damaged: it is not what was written.
    ConfigError: a later version has written it.
  """
  # Not by Orbax, which takes a damaged file for one that tells nothing.
  text = (path / "_CHECKPOINT_METADATA").read_bytes()
  try:
    told = json.loads(text)["custom_metadata"]
    told = checksum.unseal(told) if told else {}
  except (ValueError, KeyError, TypeError) as error:
    raise Damaged("_CHECKPOINT_METADATA is not what was written") from error
  if told.get("format", 1) > FORMAT:
    raise ConfigError(
      f"{path} is of format {told['format']}, and this version reads those up"
      f" to {FORMAT}; use the version that wrote it, or a later one"
    )
  return told


def reason(error: BaseException) -> str:
  """Why something failed, in one line.

  Of a chain of errors the one that began it. Where the operating system refused
  something, its own words, without those of the libraries around it.
  """
  while not isinstance(error, Damaged) and error.__cause__ is not None:
    error = error.__cause__
  text = str(error) or type(error).__name__
  if number := re.search(r"os_error_code='(\d+)'", text):
    return os.strerror(int(number[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return text.splitlines()[0].partition(" [tensorstore_spec")[0]


def newest_good(
  workdir: str, load: Callable[[epath.Path], Any]
) -> tuple[Any, int, list[int]]:
  """What `load` makes of the newest checkpoint that it can read.

  Returns:
    That, the step, and the newer steps that could not be read.

  Raises:
    ConfigError: no checkpoint, or none that can be read.
  """
  paths.check_bucket("--workdir", workdir)
  with echoes.dropped():
    return _newest_good(workdir, load)


def _newest_good(workdir, load):
  where = folder(workdir)
  while True:
    listed = steps(workdir)
    bad, why = [], ""
    for step in reversed(listed):
      try:
        loaded = _patiently(load, where / str(step))
      except ConfigError:
        raise  # the checkpoint is sound, what is asked of it is not
      except Exception as error:  # Orbax and tensorstore raise many kinds
        if not (where / str(step)).exists():
          continue  # a training run has removed it in the meantime
        why = reason(error)
        if not _is_damage(error):
          raise ConfigError(
            f"{where / str(step)} could not be read in"
            f" {len(PAUSES) + 1} tries ({why}), which does not mean that it"
            " is damaged: nothing was changed; start the same command again"
            " when the cause is gone"
          ) from error
        logging.warning(
          "checkpoint %s cannot be read (%s); trying the one before",
          where / str(step),
          why,
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
    f" {why}); restore one from a copy or choose another --workdir"
  )


def _patiently(load: Callable[[epath.Path], Any], path: epath.Path) -> Any:
  """What `load` returns; after a failure, again after each of the pauses."""
  for pause in PAUSES:
    try:
      return jax.block_until_ready(load(path))
    except ConfigError:
      raise
    except Exception as error:
      if not path.exists():
        raise
      logging.warning(
        "reading %s failed (%s); again in %g s", path, reason(error), pause
      )
      time.sleep(pause)
  return jax.block_until_ready(load(path))


def _is_damage(error: BaseException) -> bool:
  """Whether a failed read tells of the checkpoint, and not of the world.

  Files that are missing, cut off or not what they should be are damage. A disk
  or a network that does not answer, and too little memory, are none, and
  neither is what nobody has thought of.
  """
  chain = []
  while error is not None and error not in chain:
    chain.append(error)
    error = error.__cause__ or error.__context__
  if any(_is_of_the_world(link) for link in chain):
    return False
  return any(isinstance(link, _OF_FILES) for link in chain)


def _is_of_the_world(error: BaseException) -> bool:
  numbers = map(int, re.findall(r"os_error_code='(\d+)'", str(error)))
  if isinstance(error, OSError) and error.errno is not None:
    numbers = [error.errno, *numbers]
  if any(number not in (errno.ENOENT, errno.ENOTDIR) for number in numbers):
    return True
  # What JAX raises comes from a device or a compiler, not from a file.
  if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
    return True
  return any(sign in str(error) for sign in _OF_THE_WORLD)


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
