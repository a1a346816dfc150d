"""The newest good checkpoint: the same one in all processes.

One process says which checkpoints there are. Each reads its own part of one,
and where that fails in one process alone, all count it as failed: they try
again together, or go on to the one before.
"""

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from arflow_jax import paths
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import agreement, processes
from arflow_jax.training import echoes, listing
from arflow_jax.training.checksum import Damaged

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


class _Failure(NamedTuple):
  """Why a checkpoint was not read: of all processes the one that decides.

  Attributes:
    kind: `gone`, removed by a training run; `config`, sound, but not what is
      asked for; `hidden`, not seen by a process; `world`; or `damage`.
    why: in one line.
    error: what this process has caught, if anything.
  """

  kind: str
  why: str
  error: Exception | None


def read_config(workdir: str) -> ConfigDict:
  """The config stored with the newest readable checkpoint of a run.

  Raises:
    ConfigError: no run there, or none of its checkpoints can be read.
  """

  def load(path: epath.Path) -> ConfigDict:
    return agreement.together(lambda: listing.load_config(path))

  return newest_good(workdir, load)[0]


def newest_good(
  workdir: str, load: Callable[[epath.Path], Any]
) -> tuple[Any, int, list[int]]:
  """What `load` makes of the newest checkpoint that it can read.

  All processes call it.

  Args:
    workdir: the run's directory.
    load: what may fail in one process alone it does by `agreement.together`.

  Returns:
    That, the step, and the newer steps that could not be read.

  Raises:
    ConfigError: no checkpoint, or none that can be read.
  """
  agreement.together(lambda: paths.check_bucket("--workdir", workdir))
  with echoes.dropped():
    return _newest_good(workdir, load)


def _newest_good(workdir, load):
  where = listing.folder(workdir)
  while True:
    listed = listing.agreed_steps(workdir)
    bad, why = [], ""
    for step in reversed(listed):
      path = where / str(step)
      loaded, failure = _patiently(load, path)
      if failure is None:
        return loaded, step, bad
      if failure.kind == "gone":
        continue
      why = failure.why
      if failure.kind == "config":
        raise failure.error or agreement.Elsewhere(why)
      if failure.kind == "hidden":
        raise ConfigError(
          f"{path} is there for process 0, but {why}: --workdir={workdir} has"
          " to be a folder that all processes share"
        )
      if failure.kind == "world":
        raise ConfigError(
          f"{path} could not be read in {len(listing.PAUSES) + 1} tries"
          f" ({why}), which does not mean that it is damaged: nothing was"
          " changed; start the same command again when the cause is gone"
        ) from failure.error
      _warn(f"checkpoint {path} cannot be read ({why}); trying the one before")
      bad.append(step)
    if listing.agreed_steps(workdir) == listed:  # else training has moved on
      break
  if not bad:
    raise ConfigError(
      f"--workdir={workdir} holds no checkpoint; train a model there first"
    )
  raise ConfigError(
    f"none of the checkpoints in {where} can be read (steps {bad[::-1]};"
    f" {why}); restore one from a copy or choose another --workdir"
  )


def _patiently(
  load: Callable[[epath.Path], Any], path: epath.Path
) -> tuple[Any, _Failure | None]:
  """`_attempt`; after a failure, again after each of the pauses."""
  for pause in listing.PAUSES:
    loaded, failure = _attempt(load, path)
    if failure is None or failure.kind in ("gone", "config"):
      return loaded, failure
    _warn(f"reading {path} failed ({failure.why}); again in {pause:g} s")
    time.sleep(pause)
  return _attempt(load, path)


def _attempt(
  load: Callable[[epath.Path], Any], path: epath.Path
) -> tuple[Any, _Failure | None]:
  """What `load` returns, or what all processes take for its failure."""
  loaded, error, told = None, None, {}
  try:
    agreement.together(lambda: listing.about(path))  # see `listing.reading`
    loaded = jax.block_until_ready(load(path))
  except agreement.Elsewhere:
    told = {"there": _exists(path)}
  except Exception as caught:  # Orbax and tensorstore raise many kinds
    error = caught
    told = {"there": _exists(path), "why": listing.reason(error)}
    told["kind"] = "damage" if _is_damage(error) else "world"
    if isinstance(error, ConfigError):
      told["kind"] = "config"
  every = processes.gather(told)
  failed = [n for n, other in enumerate(every) if "kind" in other]
  if not failed:
    return loaded, None
  if not every[0].get("there", True):
    return None, _Failure("gone", "", error)
  for kind in ("config", "hidden", "world", "damage"):
    for number in failed:
      kinds = [every[number]["kind"]]
      kinds += ["hidden"] * (not every[number]["there"])
      if kind in kinds:
        why = every[number]["why"]
        if len(failed) < len(every):
          why = f"process {number}: {why}"
        return None, _Failure(kind, why, error)
  raise AssertionError(every)


def _exists(path: epath.Path) -> bool:
  try:
    return path.exists()
  except Exception:  # a bucket that does not answer tells nothing
    return True


def _warn(text: str) -> None:
  if processes.speaks():
    logging.warning("%s", text)


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
