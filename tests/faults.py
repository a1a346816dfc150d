"""Faults: failing reads and writes, a full disk, a flipped byte, signals.

In a test's own process, by the functions below. In a process of its own, for
signals at a named point of a main:

  python -m tests.faults POINT SIGNAL MAIN --flag=value ...
"""

import contextlib
import functools
import importlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from arflow_jax import signals

# Where a signal may arrive: what is called there, and which call it is.
TRAINING = {
  "start-up": ("arflow_jax.training.program:build", 1),
  "restoring": ("arflow_jax.training.checkpoint:_load", 1),
  "compiling": ("arflow_jax.training.state:average", 1),  # while it is traced
  "in a step": ("arflow_jax.training.program:Program.place", 4),
  "before a save": ("arflow_jax.training.saver:Saver.save", 1),
  "in a save": ("arflow_jax.training.checkpoint:contents", 3),  # see `_strike`
  "after a save": ("arflow_jax.training.saver:Saver._wait", 1),
  "before a report": ("arflow_jax.training.growing:Records.add", 2),
  "in the last save": ("arflow_jax.training.saver:Saver.finish", 1),
}
DRAWING = {
  "before drawing": ("arflow_jax.sampling.images:Generator.blocks", 1),
  "while drawing": ("arflow_jax.sampling.shards:Shards.add", 2),
  "before writing": ("arflow_jax.sampling.writers:write", 1),
  "while writing": ("arflow_jax.sampling.writers:_picture", 5),
}
# With pictures on the way.
WATCHING = {"drawing on the way": ("arflow_jax.sampling.images:Block.whole", 1)}


def run_struck(point: str, number: signal.Signals, *command: str, **kwargs):
  """Runs a main, `arflow_jax.train --flag=value`, to which a signal comes."""
  return subprocess.run(
    [sys.executable, "-m", "tests.faults", point, number.name, *command],
    capture_output=True,
    text=True,
    check=False,
    **kwargs,
  )


def fail(monkeypatch, where: str, error: Exception, calls=(1,)) -> None:
  """Makes some calls of a function, counted from 1, raise an error.

  Args:
    monkeypatch: pytest's.
    where: `module:name` or `module:class.name`.
    error: what is raised.
    calls: which calls; None for all of them.
  """
  owner, name = _find(where)
  real, count = getattr(owner, name), itertools.count(1)

  @functools.wraps(real)
  def failing(*args, **kwargs):
    if calls is None or next(count) in calls:
      raise error
    return real(*args, **kwargs)

  monkeypatch.setattr(owner, name, failing)


@contextlib.contextmanager
def files_end_at(size: int):
  """No file of this process can grow beyond some bytes; yields what lifts it.

  The operating system refuses it, whatever library writes. Compile first:
  JAX's cache of programs would warn.
  """
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield lift
  finally:
    lift()


@contextlib.contextmanager
def small_disk(folder, size: int, mode="rw"):
  """A file system of so many bytes; the test is skipped where none may be.

  Args:
    folder: where it is; made if need be, hidden if there is one.
    size: bytes.
    mode: `ro` refuses every write.
  """
  folder.mkdir(exist_ok=True)
  options = f"size={size},{mode}"
  made = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
    capture_output=True,
    text=True,
    check=False,
  )
  if made.returncode:
    pytest.skip(f"this user may not mount a small disk: {made.stderr.strip()}")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def flip(path, place: float) -> None:
  """Inverts one byte of a file, at a place from 0, its start, to 1."""
  content = bytearray(path.read_bytes())
  content[min(int(place * len(content)), len(content) - 1)] ^= 0xFF
  path.write_bytes(content)


def _find(where: str):
  module, _, name = where.partition(":")
  *classes, name = name.split(".")
  owner = functools.reduce(getattr, classes, importlib.import_module(module))
  return owner, name


def _strike(point: str, number: signal.Signals) -> None:
  """Sends this process a signal when it comes to a point."""
  where, call = (TRAINING | DRAWING | WATCHING)[point]
  owner, name = _find(where)
  real, count = getattr(owner, name), itertools.count(1)

  def strike():
    os.kill(os.getpid(), number)

  def in_a_save():  # once Orbax has made files
    folder = sys.argv[-1].removeprefix("--workdir=")
    for _ in range(10_000):
      names = [
        name
        for path, _, files in os.walk(f"{folder}/checkpoints")
        for name in files
        if "orbax-checkpoint-tmp" in path
      ]
      if len(names) > 2:
        break
      time.sleep(0.001)
    strike()

  @functools.wraps(real)
  def struck(*args, **kwargs):
    if next(count) == call:
      if point == "in a save":
        threading.Thread(target=in_a_save).start()
      else:
        strike()
    return real(*args, **kwargs)

  setattr(owner, name, struck)


if __name__ == "__main__":
  signals.watch()  # as a main does
  point, number, main, *argv = sys.argv[1:]
  _strike(point, signal.Signals[number])
  from arflow_jax import cli

  sys.argv = [main, *argv]
  sys.modules[main] = importlib.import_module(main)
  cli.run(main)
