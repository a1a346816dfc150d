"""Images on disk as they are drawn: what makes a long `sample` resumable.

A folder beside the output holds one file for each block (and process) and a
manifest of all that decides the images. The same command goes on with it after
an interruption, and no other command does. Each image has one number, and is
read back by it.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes

_MANIFEST = "manifest.json"
# Errors from reading an incomplete file. OSError is not one: one failed read is
# no reason to draw again.
_DAMAGE = (zipfile.BadZipFile, EOFError, KeyError, ValueError)


class Shards:
  """The images of one command that are drawn so far. All processes make one.

  Args:
    folder: where they lie; made if it is missing.
    manifest: all that decides the images, as JSON can hold it.
    count: images in all; their numbers are 0 .. count - 1.
    replace: whether images of another command may be removed.

  Raises:
    ConfigError: the folder holds images of another command, or other files.
  """

  def __init__(
    self,
    folder: epath.Path,
    manifest: dict[str, Any],
    count: int,
    *,
    replace: bool,
  ):
    self.folder, self._count = folder, count
    text = json.dumps(manifest)
    manifest = json.loads(text)
    self._command = zlib.crc32(text.encode())  # each file names it as well
    fresh = self._is_new(manifest, replace)
    processes.meet()  # no process writes before all have looked
    if fresh and processes.speaks():
      if folder.exists():
        self.remove()
      folder.mkdir(parents=True)
      _write(folder / _MANIFEST, json.dumps(manifest).encode())
    processes.meet()

  def _is_new(self, manifest: dict[str, Any], replace: bool) -> bool:
    path = self.folder / _MANIFEST
    if not path.exists():
      if self.folder.exists():
        for entry in self.folder.iterdir():
          if entry.name != _MANIFEST + ".part":
            raise ConfigError(
              f"{self.folder} contains {entry.name} but no manifest, so"
              " `sample` did not make it; move it away or choose another --out"
            )
      return True
    try:
      found = json.loads(path.read_text())
    except ValueError:
      found = None
    if not isinstance(found, dict):
      found = {}
    old, new = config_lib.flatten(found), config_lib.flatten(manifest)
    missing = object()
    differ = [
      key
      for key in sorted(old.keys() | new.keys())
      if old.get(key, missing) != new.get(key, missing)
    ]
    if differ and not replace:
      raise ConfigError(
        f"{self.folder} holds unfinished images of another command"
        f" ({', '.join(differ)} differ); repeat that command to finish them,"
        " choose another --out or add --overwrite to begin anew"
      )
    return bool(differ)

  def missing(self) -> Int[np.ndarray, "m"]:
    """Numbers of the images that are not drawn yet; all processes ask at once.

    Images in incomplete files count as missing; those files are removed.
    """
    there = np.zeros(self._count, bool)
    if processes.speaks():  # one look decides for all
      for path in self._files():
        try:
          there[self._read(path, "indices")] = True
        except _DAMAGE:
          path.unlink()
    # All wait for it here: no process writes a file that is about to go.
    return np.flatnonzero(~processes.common(there))

  def add(
    self, indices: Int[np.ndarray, "m"], images: UInt8[np.ndarray, "m p q K"]
  ) -> None:
    """Writes some images; they are there as a whole or not at all.

    Args:
      indices: their numbers, ascending, none of them there already.
      images: in the same order.
    """
    if not len(indices):
      return
    # In memory first: `savez` goes back in its file, object stores cannot.
    content = io.BytesIO()
    np.savez(content, indices=indices, images=images, command=self._command)
    _write(self.folder / f"{indices[0]:09}.npz", content.getvalue())

  def images(self) -> Iterator[UInt8[np.ndarray, "p q K"]]:
    """Every image in the order of the numbers.

    Holds no more than the files whose numbers overlap, those of one block.

    Raises:
      ConfigError: an image is missing or its file is damaged.
    """
    # Named by their first number: a file that holds the next image comes before
    # all those that begin after it.
    files = iter(self._files())
    held: dict[int, np.ndarray] = {}
    for number in range(self._count):
      while number not in held:
        path = next(files, None)
        if path is None:
          raise ConfigError(
            f"{self.folder} lacks image {number}; where several processes draw,"
            " --out must lie on a file system that they share"
          )
        try:
          numbers = self._read(path, "indices").tolist()
          held |= zip(numbers, self._read(path, "images"))
        except _DAMAGE as error:
          path.unlink()
          raise ConfigError(
            f"{path} is damaged ({error}) and was removed; repeat the command"
            " to draw its images again"
          ) from None
      yield held.pop(number)

  def remove(self) -> None:
    """Removes all of it.

    The manifest goes last: what an interruption leaves is still known as ours.
    """
    for entry in self.folder.iterdir():
      if entry.is_dir():
        entry.rmtree()
      elif entry.name != _MANIFEST:
        entry.unlink()
    self.folder.rmtree()

  def _files(self) -> list[epath.Path]:
    files = [p for p in self.folder.iterdir() if p.suffix == ".npz"]
    return sorted(files, key=lambda path: path.name)

  def _read(self, path: epath.Path, name: str) -> np.ndarray:
    with path.open("rb") as file, np.load(file) as shard:
      if shard["command"] != self._command:
        raise ValueError("another command wrote it meanwhile")
      return shard[name]


def _write(path: epath.Path, content: bytes) -> None:
  part = path.with_name(path.name + ".part")
  try:
    part.write_bytes(content)
    part.replace(path)
  except FileNotFoundError as error:
    raise ConfigError(
      f"{path} was removed while it was written: is the same command running"
      " twice? Let one finish, then repeat this one"
    ) from error
