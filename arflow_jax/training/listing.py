"""Which checkpoints a run has, and what they tell of themselves.

Orbax tells complete from unfinished in the way of the file system. What cannot
be read is left alone here; only a trainer sets it aside.
"""

import json
import logging
import os
import re
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import agreement, processes
from arflow_jax.training import checksum, echoes
from arflow_jax.training.checksum import Damaged

PAUSES = (1.0, 5.0)  # seconds before a failed read or save is tried again
# Of what a checkpoint holds: 1 had no checksums.
FORMAT = 2


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


def agreed_steps(workdir: str) -> list[int]:
  """Those that one process finds, in all processes; all call it."""
  return agreement.by_one(lambda: steps(workdir))


def reading() -> ocp.Context:
  """For reads in which no process waits for another, which may have failed.

  Orbax numbers what it does, and saves wait for those of the same number: begin
  a read in all processes or in none.
  """
  context, own = ocp.Context(), processes.number()
  context.multiprocessing.primary_host = own
  context.multiprocessing.active_processes = {own}
  return context


def load_config(path: epath.Path) -> ConfigDict:
  """The config of one checkpoint, with the keys that came after it.

  Raises:
    Damaged: it is not what was written.
  """
  told = about(path)
  with reading():
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


def set_aside(path: epath.Path) -> None:
  """Gives an unreadable checkpoint a name under which it is none.

  One process calls it.
  """
  aside = path.with_name(f"{path.name}.unreadable")
  suffix = 0
  while aside.exists():
    suffix += 1
    aside = path.with_name(f"{path.name}.unreadable{suffix}")
  path.rename(aside)
  logging.warning("set aside as %s", aside)
