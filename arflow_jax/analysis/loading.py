"""What a config's data pipeline gives by itself, and the memory it takes.

What a host needs is the images/s of its training, over the number of hosts:
the pipeline is fast enough where it gives more.
"""

import contextlib
import dataclasses
import os
import pathlib
import time

import numpy as np
from ml_collections import ConfigDict

from arflow_jax.data import pipeline

_SECONDS = 10.0  # of loading that are timed, at least


@dataclasses.dataclass(frozen=True)
class Loading:
  """What was measured of loading alone: no device computes meanwhile.

  Attributes:
    images_per_second: over all loader threads or processes of this host.
    batches: that were timed.
    workers: loader processes; 0 are threads.
    memory: bytes that this process and those it has started hold, memory that
      several share counted once; None where the system does not tell.
    cores: that this process may use.
  """

  images_per_second: float
  batches: int
  workers: int
  memory: int | None
  cores: int

  def table(self) -> str:
    """The figures, a line each."""
    memory = "-"
    if self.memory is not None:
      memory = f"{self.memory / 2**20:,.0f} MiB"
    cells = {
      "images/s loaded": f"{self.images_per_second:,.0f}",
      "  batches": self.batches,
      "  loader processes": self.workers,
      "  cores": self.cores,
      "memory of all processes": memory,
    }
    return "\n".join(f"{name:28}{cell:>22}" for name, cell in cells.items())


def measure(config: ConfigDict, repeats: int) -> Loading:
  """Loads batches of `config.batch_size` items, as fast as they come.

  Args:
    config: the full config; `data.source=latents`, which cannot be read yet, is
      measured with random numbers of that shape.
    repeats: batches to time, at least.

  Raises:
    ConfigError: data that cannot be read.
  """
  config = config.copy_and_resolve_references()
  if config.data.source == "latents":
    config.data.source = "random"
  config.steps = 2**31 - 1
  items = pipeline.open_items(config)
  rows = np.arange(config.batch_size)
  with contextlib.closing(pipeline.batches(items, config, 0, rows)) as batches:
    ahead = 8 * max(config.data.workers, 1)  # these were made before they count
    for _ in range(ahead + repeats):
      next(batches)
    begin, count = time.monotonic(), 0
    while count < repeats or time.monotonic() - begin < _SECONDS:
      next(batches)
      count += 1
    seconds = time.monotonic() - begin
    memory = held()
  images = count * config.batch_size * config.data.sequence_length
  cores = (
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
  )
  return Loading(images / seconds, count, config.data.workers, memory, cores)


def held() -> int | None:
  """Bytes of this process and all below it, shared memory counted once.

  None where the system has no `/proc` that tells it.
  """
  parents = {}
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # it has ended
      fields = path.read_text().rpartition(")")[2].split()
      parents[int(path.parent.name)] = int(fields[1])
  ours = {os.getpid()}
  while more := {p for p, parent in parents.items() if parent in ours} - ours:
    ours |= more
  total = 0
  for process in ours:
    try:
      text = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
      if process == os.getpid():
        return None
      continue
    line = next(x for x in text.splitlines() if x.startswith("Pss:"))
    total += int(line.split()[1]) * 1024
  return total
