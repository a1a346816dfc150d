"""Files of a run that grow while it trains, whatever happens to the disk."""

import errno
import json
import math
import os
from typing import Any

from etils import epath

from arflow_jax import paths
from arflow_jax.parallel import processes


class Growing:
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


class Records:
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
    self._file = Growing(path, content)

  def add(self, record: dict[str, Any]) -> None:
    self._file.add(json.dumps(record).encode() + b"\n")

  def close(self) -> None:
    self._file.close()


def _step(line: bytes) -> int | float:
  """The step of a record; infinite where it is none."""
  try:
    return float(json.loads(line)["step"])
  except (ValueError, TypeError, KeyError):
    return math.inf
