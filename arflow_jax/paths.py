"""Paths that a user gives, checked before any work is done for them."""

import os

from etils import epath

from arflow_jax.errors import ConfigError

# What a run keeps in its directory.
_FILES = (
  "config.json",
  "data.json",
  "launches.jsonl",
  "metrics.jsonl",
  "trainer.lock",
)


def is_local(path: str | epath.Path) -> bool:
  """Whether a path names a file of this machine, not one in a bucket."""
  return "://" not in str(path)


def expand(path: str) -> str:
  """With the home folder for a leading `~`, which shells leave in `--x=~/y`.

  Raises:
    ConfigError: the home folder of a user who is not known here.
  """
  found = os.path.expanduser(path) if path.startswith("~") else path
  if found.startswith("~"):
    raise ConfigError(
      f"{path}: {path.partition('/')[0]} is no user of this machine; write"
      f" ./{path} where it is the name of a folder"
    )
  return found


def check_writable(flag: str, path: str) -> None:
  """Raises ConfigError unless a file or folder `path` may be made. Makes none.

  Args:
    flag: the name of the setting, for the message.
    path: local, or in a bucket, which tells only when something is written.
  """
  check_bucket(flag, path)
  if not is_local(path):
    return
  whole = epath.Path(path).resolve()
  if whole.is_dir() and os.access(whole, os.W_OK):  # such as a mounted volume
    return
  parent = next(p for p in whole.parents if p.exists())
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise ConfigError(
      f"{flag}={path} cannot be written: {parent} is no folder that this user"
      " may write to"
    )


def check_workdir(workdir: str) -> None:
  """Raises ConfigError unless a run may live in this folder. Makes nothing."""
  check_writable("--workdir", workdir)
  path = epath.Path(workdir)
  folders = [path, path / "checkpoints"]
  wrong = [(part, "file") for part in folders if _is_file(part)]
  wrong += [(path / x, "folder") for x in _FILES if (path / x).is_dir()]
  if wrong:
    part, kind = wrong[0]
    raise ConfigError(
      f"--workdir={workdir}: {part} is a {kind}; move it away or choose"
      " another --workdir"
    )
  if is_local(workdir) and path.exists() and not os.access(path, os.W_OK):
    raise ConfigError(
      f"--workdir={workdir} is a folder that this user may not write to;"
      " change its permissions or choose another --workdir"
    )


def check_bucket(flag: str, path: str) -> None:
  """Raises ConfigError unless a bucket answers under this address.

  Args:
    flag: the name of the setting, for the message.
    path: local paths are left alone.
  """
  if is_local(path):
    return
  try:
    epath.Path(path).exists()
  except Exception as error:  # of any file system that epath may open
    reason = str(error).partition("\n")[0]
    raise ConfigError(
      f"{flag}={path} cannot be opened ({type(error).__name__}: {reason});"
      " paths are those of this machine, without file://, or gs://BUCKET/FOLDER"
    ) from error


def _is_file(path: epath.Path) -> bool:
  return path.exists() and not path.is_dir()
