"""Paths that a user gives, checked before any work is done for them."""

import os

from etils import epath

from arflow_jax.errors import ConfigError


def expand(path: str) -> str:
  """With the home folder for a leading `~`, which shells leave in `--x=~/y`."""
  return os.path.expanduser(path) if path.startswith("~") else path


def check_writable(flag: str, path: str) -> None:
  """Raises ConfigError unless a file or folder `path` may be made. Makes none.

  Args:
    flag: the name of the setting, for the message.
    path: local, or in a bucket, which tells only when something is written.
  """
  if "://" in path:
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
  for folder in (path, path / "checkpoints"):
    if folder.exists() and not folder.is_dir():
      raise ConfigError(
        f"--workdir={workdir}: {folder} is a file; move it away or choose"
        " another --workdir"
      )
  if "://" not in workdir and path.exists() and not os.access(path, os.W_OK):
    raise ConfigError(
      f"--workdir={workdir} is a folder that this user may not write to;"
      " change its permissions or choose another --workdir"
    )
