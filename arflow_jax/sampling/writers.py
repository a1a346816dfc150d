"""Where images go: a labelled PNG grid, an `.npz`, or a folder of PNGs.

Each is written from images that come one by one, so that their number does not
matter, and takes its place only when it is whole.
"""

import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from arflow_jax import paths
from arflow_jax.errors import ConfigError

_GAP = 4  # pixels between tiles
_IMAGE_NAME = re.compile(r"\d{6,}_class\d+\.png")
_TILE = 64  # tiles smaller than this are enlarged by a whole factor

Pictures = Iterable[UInt8[np.ndarray, "p q K"]]


class Layout(NamedTuple):
  """What a set of images looks like.

  Attributes:
    shape: of one image, `[p, q, K]` with one channel or three.
    labels: class of each image, for the names of files.
    names: a name for each row of the grid.
    per_row: images in a row of the grid.
  """

  shape: tuple[int, int, int]
  labels: Int[np.ndarray, "n"]
  names: Sequence[str]
  per_row: int


def check_output(out: str, overwrite: bool) -> None:
  """Raises ConfigError unless images may be written to `out`. Makes nothing."""
  path = epath.Path(out)
  kinds = (".png", ".npz", "")
  if path.name in kinds or path.suffix not in kinds:
    raise ConfigError(
      f"--out={out} must end in .png (a grid) or .npz, or be a new folder"
    )
  if path.exists() and path.is_dir() == bool(path.suffix):
    kind = "folder" if path.is_dir() else "file"
    raise ConfigError(f"--out={out} is a {kind} already; choose another name")
  taken = any(path.iterdir()) if path.is_dir() else path.exists()
  if taken and not overwrite:
    raise ConfigError(f"--out={out} exists; choose another or add --overwrite")
  if path.is_dir():  # replaced as a whole: it must hold nothing else
    for entry in path.iterdir():
      if not _IMAGE_NAME.fullmatch(entry.name):
        raise ConfigError(
          f"--out={out} holds {entry.name}, which is no image of ours: it is"
          " not replaced; choose another folder"
        )
  paths.check_writable("--out", out)


def check_layout(out: str, layout: Layout) -> None:
  """Raises ConfigError unless `out` can hold such images."""
  if layout.shape[-1] not in (1, 3):
    size = " x ".join(map(str, layout.shape))
    raise ConfigError(f"--out={out}: {size} arrays are no pictures")
  if epath.Path(out).suffix == ".png":
    width, height = _Grid(layout).size
    if width * height > Image.MAX_IMAGE_PIXELS:
      raise ConfigError(
        f"--out={out}: a grid of {len(layout.labels)} images has {width} x"
        f" {height} pixels, more than most programs open; draw fewer, or choose"
        " X.npz or a folder"
      )


def write(
  out: str,
  images: Pictures,
  layout: Layout,
  *,
  scratch: epath.Path,
  overwrite: bool,
) -> None:
  """Writes images; an existing output is replaced once all are written.

  Args:
    out: `X.png` for a grid, `X.npz` for `arr_0` uint8 `[n, p, q, K]` (the form
      of the ADM evaluation suite), anything else for a folder.
    images: in order.
    layout: what they look like.
    scratch: a folder on the same disk, for what is not whole yet.
    overwrite: whether an output that is there may be replaced.

  Raises:
    ConfigError: something has come into the way of the output.
  """
  path = epath.Path(out)
  part = scratch / f"whole{path.suffix}"
  if path.suffix == ".npz":
    _write_npz(part, images, layout)
  elif path.suffix:
    _save(_Grid(layout).draw(images), part)
  else:
    if part.exists():
      part.rmtree()
    part.mkdir()
    for index, (image, label) in enumerate(zip(images, layout.labels)):
      _save(_picture(image), part / f"{index:06}_class{label}.png")
  check_output(out, overwrite)  # again: drawing may have taken hours
  if path.is_dir():
    path.rmtree()
  part.replace(path)


class _Stream:
  """A file to write from its beginning to its end.

  Object stores cannot go back in a file. `zipfile` does not, where there is no
  `seek` and no `tell`, but it counts the bytes that it is told were written;
  TensorFlow's files, which epath opens for `gs://`, do not tell.
  """

  def __init__(self, file: Any):
    self._file, self.flush = file, file.flush

  def write(self, content: bytes) -> int:
    self._file.write(content)
    return len(content)


def _write_npz(path: epath.Path, images: Pictures, layout: Layout) -> None:
  header = {
    "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
    "fortran_order": False,
    "shape": (len(layout.labels), *layout.shape),
  }
  with (
    path.open("wb") as file,
    zipfile.ZipFile(_Stream(file), "w") as archive,
    archive.open("arr_0.npy", "w", force_zip64=True) as array,
  ):
    np.lib.format.write_array_header_1_0(array, header)
    for image in images:
      array.write(image.tobytes())


class _Grid:
  """Rows of enlarged tiles with a gap between them and a name beside each row.

  Small images grow by a whole factor, pixel by pixel, so that they can be read.
  """

  def __init__(self, layout: Layout):
    height, width, _ = layout.shape
    factor = max(1, -(-_TILE // max(height, width)))
    self._tile = width * factor, height * factor
    self._names, self._per_row = layout.names, layout.per_row
    self._font = ImageFont.load_default(size=24)
    lengths = [round(self._font.getlength(name)) for name in layout.names]
    self._margin = _GAP * 2 + max(lengths)
    rows = -(-len(layout.labels) // layout.per_row)
    self.size = (
      self._margin + layout.per_row * (self._tile[0] + _GAP) + _GAP,
      rows * (self._tile[1] + _GAP) + _GAP,
    )

  def draw(self, images: Pictures) -> Image.Image:
    """The whole sheet."""
    sheet = Image.new("RGB", self.size, "white")
    draw = ImageDraw.Draw(sheet)
    width, height = self._tile
    for index, image in enumerate(images):
      row, column = divmod(index, self._per_row)
      top = _GAP + row * (height + _GAP)
      if column == 0:
        at = (_GAP, top + height / 2)
        name = self._names[row]
        draw.text(at, name, fill="black", font=self._font, anchor="lm")
      tile = _picture(image).resize(self._tile, Image.Resampling.NEAREST)
      sheet.paste(tile, (self._margin + _GAP + column * (width + _GAP), top))
    return sheet


def _picture(image: UInt8[np.ndarray, "p q K"]) -> Image.Image:
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _save(picture: Image.Image, path: epath.Path) -> None:
  with path.open("wb") as file:
    picture.save(file, format="PNG")
