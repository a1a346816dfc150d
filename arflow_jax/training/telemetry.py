"""What a run says of itself: progress lines, a metrics file, TensorBoard.

After a crash a launch repeats steps; a reader of either file sees each once,
with the values of the last launch.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from arflow_jax.parallel import processes
from arflow_jax.training.events import Events
from arflow_jax.training.growing import Records
from arflow_jax.training.launches import Launches

# What differs from launch to launch; all else in a record is a metric.
MEASURED = (
  "images_per_second",
  "step_time",
  "mfu",
  "input_wait",
  "peak_memory",
  "skew",
  "slowest_process",
  "goodput",
)


class Telemetry:
  """Progress on the console and metrics in the run's directory.

  One process speaks for all. With its metrics a record holds what was measured
  over the steps since the last report, without what lay between them, such as
  saving and drawing:

  - `images_per_second`; `step_time`, in seconds.
  - `mfu`: model FLOPs utilization,
    `model FLOPs of a step / (step_time x devices x peak FLOP/s of a device)`.
    Model FLOPs are 3x those of the forward pass, what is computed again for the
    backward pass is not counted, and the peak is that of bfloat16 products.
    Left out on devices whose peak is not known here, such as CPUs.
  - `input_wait`: the share of that time in which the process that waited
    longest waited for data. Devices compute meanwhile: they wait less.
  - `peak_memory`: bytes, the most that any device has held since its process
    began. Left out where devices do not tell, such as CPUs.
  - `skew`, `slowest_process`: of several processes, by how many seconds a step
    the slowest is later than the fastest, and its number. What counts is the
    time that a process takes by itself, to wait for its data, start the steps
    and write its records; for all else all of them wait together.
  - `goodput`: see `launches.Launches`.

  Args:
    workdir: the run's directory, made if need be.
    start: steps done before this launch.
    total: steps when the run is finished.
    images_per_step: for the images/s figure.
    ideal: seconds that a step takes at the peak rate of all devices; None where
      that is not known.
  """

  def __init__(
    self,
    workdir: str,
    start: int,
    total: int,
    images_per_step: int,
    ideal: float | None = None,
  ):
    self._records = self._events = self._launches = None
    if processes.speaks():
      folder = epath.Path(workdir)
      folder.mkdir(parents=True, exist_ok=True)
      self._records = Records(folder / "metrics.jsonl", start)
      self._events = Events(folder, start)
      self._launches = Launches(folder, start, _hardware())
    self._total, self._images, self._ideal = total, images_per_step, ideal
    self._first = self._last = start
    self._clock = self._begin = None
    self._between = True  # no step is under way
    self._called = 0.0
    self._waited = self._own = 0.0  # seconds since the last report

  def start_clock(self, step: int) -> None:
    """Starts timing after `step`: the first step compiles and is left out."""
    self._clock = self._begin = time.monotonic()
    self._first = self._last = step
    self._waited = self._own = 0.0

  def timed(
    self, batches: Iterator[dict[str, np.ndarray]]
  ) -> Iterator[dict[str, np.ndarray]]:
    """The same batches, and notes how long each was waited for."""
    end = object()
    while True:
      called = time.monotonic()
      if (batch := next(batches, end)) is end:
        return
      self._waited += time.monotonic() - called
      yield batch

  def begin(self) -> None:
    """Notes that a process turns to the next step."""
    self._called = time.monotonic()
    if self._between and self._clock is not None:
      self._clock = self._called
    self._between = False

  def started(self) -> None:
    """Notes that it has started the step."""
    self._own += time.monotonic() - self._called

  @contextlib.contextmanager
  def paused(self, state: Any) -> Iterator[None]:
    """What is done inside, between two steps, is no part of their time.

    Args:
      state: arrays that the steps under way will give; they are waited for.
    """
    jax.block_until_ready(state)
    begin = time.monotonic()
    yield
    if self._clock is not None:
      self._clock += time.monotonic() - begin

  def report(
    self, step: int, metrics: dict[str, float], *, record: bool = True
  ) -> None:
    """Writes one progress line, and one record if asked for; all call it.

    Args:
      step: optimiser steps done.
      metrics: scalars, `loss` among them.
      record: whether files get it too.
    """
    now = time.monotonic()
    took, found = 0.0, {}
    if self._clock is not None and step > self._last:
      took = max(now - self._clock, 1e-9)
      found = self._measure(step - self._last, took, record)
    if self._launches:
      goodput = self._launches.report(step, took)
      if found:
        found["goodput"] = goodput
    self._say(step, now, metrics["loss"], found)
    metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}
    if self._records and record:
      self._records.add({"step": step} | metrics | found)
      self._events.add(step, metrics | found)
    self._clock, self._last, self._between = now, step, True
    self._waited, self._own = 0.0, time.monotonic() - now

  def picture(self, step: int, png: bytes) -> None:
    """Shows a picture that was drawn after a step in TensorBoard."""
    if self._events:
      self._events.picture(step, "pictures", png)

  def close(self) -> None:
    """Says which records could not be written to the end."""
    for file in (self._records, self._events, self._launches):
      if file:
        file.close()

  def _measure(
    self, steps: int, took: float, record: bool
  ) -> dict[str, float | int]:
    """What is known of some steps, and of all processes for a record."""
    each = took / steps
    found = {"images_per_second": self._images / each, "step_time": each}
    if self._ideal is not None:
      found["mfu"] = self._ideal / each
    rows = [[self._own / steps, self._waited / took, _peak()]]
    if record and processes.count() > 1:
      rows = processes.gather(rows[0])
    own, waited, peak = np.asarray(rows).T
    found["input_wait"] = float(waited.max())
    if peak.max() > 0:
      found["peak_memory"] = int(peak.max())
    if len(rows) > 1:
      found["skew"] = float(own.max() - own.min())
      found["slowest_process"] = int(own.argmax())
    return found

  def _say(
    self, step: int, now: float, loss: float, found: dict[str, float | int]
  ) -> None:
    line = f"step {step:>{len(str(self._total))}}/{self._total}"
    line += f"  loss {loss:.4f}"
    if found:
      mean = (now - self._begin) / (step - self._first)
      line += f"  {found['images_per_second']:,.0f} images/s"
      line += f"  {_duration(mean * (self._total - step))} left"
      line += self._remarks(found)
    processes.say(line)

  def _remarks(self, found: dict[str, float | int]) -> str:
    """What is worth a place on the line."""
    parts = []
    if "mfu" in found:
      parts.append(f"MFU {found['mfu']:.1%}")
    if found["input_wait"] > 0.05:
      parts.append(f"{found['input_wait']:.0%} waiting for data")
    if found.get("skew", 0) > 0.05 * found["step_time"]:
      late = 1e3 * found["skew"]
      parts.append(f"process {found['slowest_process']} {late:.0f} ms late")
    if self._launches and self._launches.count > 1 and found["goodput"] < 0.9:
      parts.append(f"goodput {found['goodput']:.0%}")
    return "".join(f"  {part}" for part in parts)


def _hardware() -> dict[str, Any]:
  return {
    "processes": processes.count(),
    "devices": jax.device_count(),
    "kind": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }


def _peak() -> int:
  """The most bytes that a device of this process has held; 0: it is unknown."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  return max(each.get("peak_bytes_in_use", 0) for each in stats)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
