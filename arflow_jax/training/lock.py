"""One trainer in a workdir: a lock that a dead trainer cannot hold.

The operating system gives it back when its process ends, however it ends. An
object store has no locks: there nobody is kept out.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator

from arflow_jax import paths
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import agreement
from arflow_jax.training import listing


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
  """Keeps other trainers out of a run, by the file `WORKDIR/trainer.lock`.

  One process of a job holds it, and all of them call this.

  Raises:
    ConfigError: another trainer is at work there; the message names it.
  """
  lock = None

  def take():
    nonlocal lock
    holder = ""
    folder = listing.folder(workdir).parent
    try:
      folder.mkdir(parents=True, exist_ok=True)
      lock = os.open(folder / "trainer.lock", os.O_RDWR | os.O_CREAT, 0o644)
      holder = _take(lock)
    except OSError as error:
      holder = f"cannot be written: {error}"
    if holder:
      raise ConfigError(f"--workdir={workdir} {holder}")

  try:
    if paths.is_local(workdir):
      agreement.by_one(take)
    yield
  finally:
    if lock is not None:
      os.close(lock)


def _take(lock: int) -> str:
  """Takes the lock, or tells why not."""
  try:
    # Of this process alone: what it starts does not inherit it.
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError):
    name = os.read(lock, 200).decode(errors="replace") or "which just began"
    return (
      f"is in use by another trainer ({name}); stop it, or choose another"
      " --workdir"
    )
  except OSError:  # a file system without locks
    return ""
  since = time.strftime("%Y-%m-%d %H:%M:%S")
  with contextlib.suppress(OSError):  # a full disk; the lock is ours anyway
    os.ftruncate(lock, 0)
    name = f"process {os.getpid()} on {socket.gethostname()} since {since}"
    os.write(lock, name.encode())
  return ""
