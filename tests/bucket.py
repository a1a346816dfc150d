"""A stand-in for an object store: `bucket://`, known to epath alone.

Files can be written from the beginning to the end only, and nothing but epath
and Orbax finds them: its paths look like local ones that do not exist.
"""

import contextlib
import os
import sys

from etils import epath

# epath itself, and Orbax, also where it leaves a call to a thread.
_MAY_LOOK_BEHIND = ("etils.", "orbax.", "concurrent.futures.")


@epath.register_path_cls("bucket://")
class Bucket(type(epath.Path("/"))):
  """A path of the bucket. Its files lie below `ROOT`."""

  ROOT = ""

  def __new__(cls, *parts):
    return super().__new__(cls, *map(cls._inside, parts))

  def __init__(self, *parts):
    if sys.version_info >= (3, 12):  # where pathlib reads the parts here
      super().__init__(*map(self._inside, parts))

  @classmethod
  def _inside(cls, part):
    part = str(part) if isinstance(part, Bucket) else os.fspath(part)
    for prefix in (f"{cls.ROOT}/", "bucket://"):
      if part.startswith(prefix):
        return "/bucket/" + part.removeprefix(prefix)
    return part

  @property
  def _path_str(self):
    return "/".join([self.ROOT, *self.parts[2:]])

  def __str__(self):
    if _caller().startswith("orbax."):  # tensorstore knows local paths alone
      return self._path_str
    return "/".join(["bucket:/", *self.parts[2:]])

  def __fspath__(self):
    if not _caller().startswith(_MAY_LOOK_BEHIND):
      raise TypeError(f"{_caller()} takes {self} for a local file")
    return self._path_str

  def open(self, mode="r", **kwargs):
    file = super().open(mode, **kwargs)
    return _written(file) if mode == "wb" else file


def _caller():
  """The module that wants to have the path as text, by whatever way."""
  frame = sys._getframe(2)
  while frame.f_globals["__name__"] in ("pathlib", "posixpath"):
    frame = frame.f_back
  return frame.f_globals["__name__"]


class Refused(Exception):
  """Not an OSError, as with TensorFlow's files."""


class _Writer:
  """What TensorFlow's file of an object store can do when it is written."""

  def __init__(self, file):
    self._file, self.flush = file, file.flush

  def write(self, content):
    if not isinstance(content, (bytes, bytearray)):
      raise Refused(f"bytes are written, not {type(content)}")
    self._file.write(content)

  def seek(self, *_):
    raise Refused("a file that is written cannot go back")

  tell = read = seek


@contextlib.contextmanager
def _written(file):
  with file:
    yield _Writer(file)
