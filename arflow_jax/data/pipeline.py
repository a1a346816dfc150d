"""Batches in an order that is a pure function of (seed, step), through grain.

The step is the whole position in the data: starting at step k gives exactly the
batches that an uninterrupted run would have seen from step k on, whatever the
number of processes or loader workers.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags
from jaxtyping import Int
from ml_collections import ConfigDict

from arflow_jax.data import sequences, sources

_AHEAD = 8  # batches that are made before they are asked for
_LOOK = 0.2  # seconds between two looks at the loader processes
_WAIT = 2.0  # seconds for a batch, once one of them was killed
_PATIENCE = 30.0  # seconds that they have to end, a batch's time included


def open_items(config: ConfigDict) -> sequences.ClassSequences:
  """The stream of training items of a config.

  Raises:
    ConfigError: data that cannot be read or does not fit the model.
  """
  return sequences.ClassSequences(
    sources.open_source(config, "train"),
    config.data.sequence_length,
    config.seed,
    config.data.flip,
  )


def batches(
  items: sequences.ClassSequences,
  config: ConfigDict,
  start: int,
  rows: Int[np.ndarray, "n"],
) -> Iterator[dict[str, np.ndarray]]:
  """Yields some rows of the batches of steps start, start + 1, ...

  Close it, so that threads and processes end. Where a loader process was
  killed, the next batch raises OSError.

  Args:
    items: what `open_items` returned.
    config: the full config.
    start: steps that are done.
    rows: which rows of each global batch of `config.batch_size` items, those
      that this process's devices hold.
  """
  local = _LocalRows(items, config.batch_size, rows)
  stop = max(config.steps, start)
  dataset = grain.MapDataset.range(start * len(rows), stop * len(rows))
  dataset = dataset.map(local).batch(len(rows))
  # In batches, in each process: grain's own default would hold 500 of them.
  options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=_AHEAD)
  if config.data.workers == 0:
    return iter(dataset.to_iter_dataset(options))
  if not flags.FLAGS.is_parsed():  # loader processes want parsed flags
    flags.FLAGS.mark_as_parsed()
  _start_tracker()
  workers = grain.MultiprocessingOptions(num_workers=config.data.workers)
  # Through pipes: what was read ahead, or is held when the process ends, would
  # stay in grain's shared memory. A copy more costs about 2 ms a MB.
  piped = grain.experimental.WithOptionsIterDataset(
    dataset.to_iter_dataset(options),
    grain.experimental.DatasetOptions(min_shm_size=sys.maxsize),
  )
  piped = piped.mp_prefetch(workers, worker_init_fn=_begin_worker)
  return _Loaders(iter(piped), config.data.workers)


class _Loaders:
  """The batches of loader processes, and an error where one was killed.

  A process that dies while it writes a batch leaves its reader waiting for the
  rest for ever, and one that dies while it starts may do so too. So a thread
  reads, two batches ahead, and may be left behind.

  Args:
    batches: grain's iterator.
    count: loader processes.
  """

  def __init__(self, batches: Iterator[dict[str, np.ndarray]], count: int):
    self._read = queue.Queue(1)
    self._closed = threading.Event()
    self._count, self._processes = count, frozenset()
    threading.Thread(target=self._watch, daemon=True).start()
    self._thread = threading.Thread(
      target=self._run, args=(batches,), daemon=True, name=f"{__name__}.reader"
    )
    self._thread.start()

  def __iter__(self) -> "_Loaders":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    waited = 0.0
    while True:
      try:
        batch, error = self._read.get(timeout=_LOOK)
        break
      except queue.Empty:
        if code := self._killed():
          waited += _LOOK
          if waited > _WAIT:  # the others may have brought theirs in that time
            raise _death(code) from None
    if error is None:
      return batch
    if found := re.match(r"Worker process .* exit code (-?\d+)", str(error)):
      raise _death(int(found[1])) from None  # as grain says it
    raise error

  def close(self) -> None:
    """Ends the thread and the processes."""
    self._closed.set()
    end = time.monotonic() + _PATIENCE
    while self._thread.is_alive() and time.monotonic() < end:
      with contextlib.suppress(queue.Empty):
        self._read.get(timeout=_LOOK)
      if self._killed():
        break
    if self._thread.is_alive():
      for process in self._processes:
        process.kill()
        process.join(1)

  def _run(self, batches):
    with contextlib.closing(batches):
      while not self._closed.is_set():
        try:
          read = next(batches), None
        except Exception as error:  # StopIteration among them
          read = None, error
        self._read.put(read)
        if read[1]:
          return

  def _watch(self):
    # Often: one that has ended before is not among the active ones.
    while not self._closed.wait(_LOOK):
      self._processes |= {
        process
        for process in multiprocessing.active_children()
        if process.name.startswith("grain-process-prefetch")
      }

  def _killed(self) -> int:
    """The exit code of a loader that has failed, or 0."""
    codes = [process.exitcode for process in self._processes]
    if len(codes) < self._count and hasattr(os, "waitid"):
      # One that is starting is not among the active ones yet.
      look = os.WEXITED | os.WNOHANG | os.WNOWAIT  # leaves it to be seen
      with contextlib.suppress(ChildProcessError):
        found = os.waitid(os.P_ALL, 0, look)
        if found and found.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
          codes.append(-found.si_status)
    return next((code for code in codes if code), 0)


def _death(code: int) -> OSError:
  """What is said of a loader process that has ended before its time."""
  why = f"a loader process has ended with code {code}"
  if code == -signal.SIGKILL:
    why += (
      ", killed, as the system does for want of memory; where that comes back,"
      " lower data.workers"
    )
  return OSError(why)


def _start_tracker():
  """Starts the process by which Python removes what a killed process leaves.

  It would warn of leaks also where a trainer is stopped while it compiles.
  """
  name, former = "PYTHONWARNINGS", os.environ.get("PYTHONWARNINGS")
  os.environ[name] = "ignore:resource_tracker"
  resource_tracker.ensure_running()
  del os.environ[name]
  if former is not None:
    os.environ[name] = former


def _begin_worker(index: int, count: int) -> None:
  """Leaves signals, which may come to all, to the process that trains.

  And ends with that process, also where it was killed.

  Args:
    index: of this loader process.
    count: loader processes in all.
  """
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)


@dataclasses.dataclass(frozen=True)
class _LocalRows:
  """Maps the count of items this process has made to the global stream."""

  items: sequences.ClassSequences
  batch: int
  rows: np.ndarray

  def __call__(self, local: int) -> dict[str, np.ndarray]:
    step, place = divmod(local, len(self.rows))
    return self.items[step * self.batch + int(self.rows[place])]
