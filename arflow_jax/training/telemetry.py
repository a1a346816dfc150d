"""What a run says of itself: progress lines, a metrics file, TensorBoard.

clu's TensorBoard writer needs TensorFlow. Where that is absent the run says so
once and keeps to the console and `metrics.jsonl`.
"""

import json
import math
import os
import time
from typing import Any

from absl import logging
from etils import epath

from arflow_jax.parallel import processes


class Telemetry:
  """Progress on the console and metrics in the run's directory.

  One process speaks for all.

  Args:
    workdir: the run's directory, made if need be.
    start: steps done before this launch.
    total: steps when the run is finished.
    images_per_step: for the images/s figure.
  """

  def __init__(
    self, workdir: str, start: int, total: int, images_per_step: int
  ):
    self._file = self._writer = None
    if processes.speaks():
      folder = epath.Path(workdir)
      folder.mkdir(parents=True, exist_ok=True)
      self._file = _Records(folder / "metrics.jsonl", start)
      self._writer = _tensorboard(folder)
    self._total, self._images = total, images_per_step
    self._first = self._last = start
    self._clock = self._begin = None

  def start_clock(self, step: int) -> None:
    """Starts timing after `step`: the first step compiles and is left out."""
    self._clock = self._begin = time.monotonic()
    self._first = self._last = step

  def report(
    self, step: int, metrics: dict[str, float], *, record: bool = True
  ) -> None:
    """Writes one progress line, and one record if asked for.

    Args:
      step: optimiser steps done.
      metrics: scalars, `loss` among them.
      record: whether files get it too.
    """
    now = time.monotonic()
    line = f"step {step:>{len(str(self._total))}}/{self._total}"
    line += f"  loss {metrics['loss']:.4f}"
    if self._clock is not None and step > self._last:
      rate = (step - self._last) * self._images / (now - self._clock)
      mean = (now - self._begin) / (step - self._first)
      metrics = metrics | {"images_per_second": rate}
      line += f"  {rate:,.0f} images/s"
      line += f"  {_duration(mean * (self._total - step))} left"
    self._clock, self._last = now, step
    processes.say(line)
    if not record:
      return
    if self._file:
      self._file.add({"step": step} | metrics)
    if self._writer:
      self._writer.write_scalars(step, metrics)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._writer:
      self._writer.close()


class _Records:
  """A file of one JSON record a line, in which each step stands once.

  Records of steps that a launch is about to repeat are left out, and so is a
  line that a crash cut off. Object stores can neither append nor truncate:
  there the file is written anew with each record.

  Args:
    path: of the file, made anew at once.
    start: steps done before this launch.
  """

  def __init__(self, path: epath.Path, start: int):
    self._path = path
    kept = path.read_text().splitlines() if path.exists() else []
    self._lines = [line for line in kept if _step(line) <= start]
    self._whole = "://" in str(path)
    if self._lines != kept:
      self._write()

  def add(self, record: dict[str, Any]) -> None:
    line = json.dumps(record)
    if self._whole:
      self._lines.append(line)
      self._write()
    else:
      with self._path.open("a") as file:
        file.write(line + "\n")

  def _write(self):
    part = self._path.with_name(self._path.name + ".part")
    part.write_text("".join(line + "\n" for line in self._lines))
    part.replace(self._path)


def _step(line: str) -> int | float:
  """The step of a record; infinite where it is none."""
  try:
    return json.loads(line)["step"]
  except (ValueError, TypeError, KeyError):
    return math.inf


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _tensorboard(folder: epath.Path):
  # TensorFlow computes nothing here: this only spares its start-up chatter.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(folder))
  except ImportError:
    logging.warning(
      "TensorFlow is not installed: no TensorBoard files, metrics go to the"
      " console and %s",
      folder / "metrics.jsonl",
    )
    return None
