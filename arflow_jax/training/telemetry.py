"""What a run says of itself: progress lines, a metrics file, TensorBoard.

After a crash a launch repeats steps; a reader of either file sees each once,
with the values of the last launch. TensorFlow is not needed.
"""

import errno
import io
import json
import math
import os
import socket
import time
from typing import Any

from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from arflow_jax import paths
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
    self._records = self._events = None
    if processes.speaks():
      folder = epath.Path(workdir)
      folder.mkdir(parents=True, exist_ok=True)
      self._records = _Records(folder / "metrics.jsonl", start)
      self._events = _Events(folder, start)
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
    metrics = {k: v for k, v in metrics.items() if math.isfinite(v)}
    if self._records and record:
      self._records.add({"step": step} | metrics)
      self._events.add(step, metrics)

  def close(self) -> None:
    """Says which records could not be written to the end."""
    if self._records:
      self._records.file.close()
      self._events.file.close()


class _Growing:
  """A file that grows by whole records.

  Object stores cannot append: there it is written anew with each record. Where
  a record cannot be written it waits for the next one: a full disk, which may
  be mended, costs neither the run nor the record.

  Args:
    path: of the file.
    content: what it holds already.
  """

  def __init__(self, path: epath.Path, content: bytes = b""):
    self._path, self._content = path, content
    self._whole = not paths.is_local(path)
    self._waiting = b""

  def add(self, record: bytes) -> None:
    waited = bool(self._waiting)
    self._waiting += record
    if (why := self._write()) and not waited:
      processes.say(
        f"{self._path} could not be written ({why}): training goes on, and its"
        " records wait until it can"
      )

  def close(self) -> None:
    if self._waiting and (why := self._write()):
      lost = len(self._waiting)
      processes.say(f"{self._path} lacks its last {lost} bytes ({why})")

  def _write(self) -> str:
    """Writes all that waits, or nothing; the reason why not."""
    try:
      if self._whole:
        self._path.write_bytes(self._content + self._waiting)
        self._content += self._waiting
      else:
        with open(self._path, "ab", buffering=0) as file:
          before = file.tell()
          if file.write(self._waiting) < len(self._waiting):
            file.truncate(before)  # there was room for a part only
            return os.strerror(errno.ENOSPC)
    except OSError as error:
      return error.strerror or str(error)
    self._waiting = b""
    return ""


class _Records:
  """A file of one JSON record a line, in which each step stands once.

  Records of steps that a launch is about to repeat are left out, and so is a
  line that a crash cut off.

  Args:
    path: of the file, made anew at once.
    start: steps done before this launch.
  """

  def __init__(self, path: epath.Path, start: int):
    found = path.read_bytes() if path.exists() else b""
    kept = [line for line in found.splitlines() if _step(line) <= start]
    content = b"".join(line + b"\n" for line in kept)
    if content != found:
      part = path.with_name(path.name + ".part")
      part.write_bytes(content)
      part.replace(path)
    self.file = _Growing(path, content)

  def add(self, record: dict[str, Any]) -> None:
    self.file.add(json.dumps(record).encode() + b"\n")


class _Events:
  """TensorBoard's file of one launch.

  TensorBoard reads the files of a folder in the order of their names and joins
  them. The start that opens this one makes it drop what it read for later
  steps: a launch after a crash repeats them.

  Args:
    folder: that of the run.
    start: steps done before this launch.
  """

  def __init__(self, folder: epath.Path, start: int):
    second, rest = divmod(time.time_ns(), 10**9)
    name = f"events.out.tfevents.{second:010}.{rest:09}.{socket.gethostname()}"
    self.file = _Growing(folder / name)
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(file_version="brain.Event:2")
    self._add(step=start + 1, session_log=begin)

  def add(self, step: int, metrics: dict[str, float]) -> None:
    # Only of simple values do all of TensorBoard's readers drop the later ones.
    value = summary_pb2.Summary.Value
    values = [value(tag=k, simple_value=v) for k, v in metrics.items()]
    self._add(step=step, summary=summary_pb2.Summary(value=values))

  def _add(self, **content: Any):
    event = event_pb2.Event(wall_time=time.time(), **content)
    framed = io.BytesIO()
    RecordWriter(framed).write(event.SerializeToString())
    self.file.add(framed.getvalue())


def _step(line: bytes) -> int | float:
  """The step of a record; infinite where it is none."""
  try:
    return float(json.loads(line)["step"])
  except (ValueError, TypeError, KeyError):
    return math.inf


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
