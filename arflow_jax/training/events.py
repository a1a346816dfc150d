"""What TensorBoard reads of a run. TensorFlow is not needed."""

import io
import socket
import time
from typing import Any

from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from arflow_jax.training.growing import Growing


class Events:
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
    self._file = Growing(folder / name)
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(file_version="brain.Event:2")
    self._add(step=start + 1, session_log=begin)

  def add(self, step: int, metrics: dict[str, float]) -> None:
    # Only of simple values do all of TensorBoard's readers drop the later ones.
    value = summary_pb2.Summary.Value
    values = [value(tag=k, simple_value=v) for k, v in metrics.items()]
    self._add(step=step, summary=summary_pb2.Summary(value=values))

  def picture(self, step: int, tag: str, png: bytes) -> None:
    width, height = (int.from_bytes(png[i : i + 4]) for i in (16, 20))
    image = summary_pb2.Summary.Image(
      width=width, height=height, colorspace=3, encoded_image_string=png
    )
    value = summary_pb2.Summary.Value(tag=tag, image=image)
    self._add(step=step, summary=summary_pb2.Summary(value=[value]))

  def close(self) -> None:
    self._file.close()

  def _add(self, **content: Any):
    event = event_pb2.Event(wall_time=time.time(), **content)
    framed = io.BytesIO()
    RecordWriter(framed).write(event.SerializeToString())
    self._file.add(framed.getvalue())
