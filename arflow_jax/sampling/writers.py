"""Where images go: a labelled PNG grid, an `.npz`, or a folder of PNGs."""

import pathlib
import re
import shutil
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from arflow_jax.errors import ConfigError

_GAP = 4  # pixels between tiles
_IMAGE_NAME = re.compile(r"\d{6,}_class\d+\.png")
_TILE = 64  # tiles smaller than this are enlarged by a whole factor


def check_output(out: str, overwrite: bool) -> None:
  """Raises ConfigError unless images may be written to `out`."""
  path = pathlib.Path(out)
  if not path.name or path.suffix not in (".png", ".npz", ""):
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
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"--out={out} cannot be written: {error}") from None


def write(
  out: str,
  blocks: Iterable[UInt8[np.ndarray, "b h w C"]],
  labels: Sequence[int],
  names: Sequence[str],
  per_row: int,
) -> None:
  """Writes all images; an existing output is replaced only once all are drawn.

  Args:
    out: `X.png` for a grid, `X.npz` for `arr_0` uint8 `[n, h, w, C]` (the
      form of the ADM evaluation suite), anything else for a folder.
    blocks: the images, in order.
    labels: class of each image, for the names of files.
    names: a name for each row of the grid.
    per_row: images in a row of the grid.
  """
  path = pathlib.Path(out)
  part = path.with_name(path.name + ".part" + path.suffix)
  if path.suffix:
    images = np.concatenate(list(blocks))
    if path.suffix == ".npz":
      np.savez(part, arr_0=images)
    else:
      grid(images, names, per_row).save(part)
    part.replace(path)
    return
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir()
  index = 0
  for block in blocks:
    for image in block:
      name = f"{index:06}_class{labels[index]}.png"
      _picture(image).save(part / name)
      index += 1
  if path.is_dir():
    shutil.rmtree(path)
  part.replace(path)


def grid(
  images: UInt8[np.ndarray, "n h w C"], names: Sequence[str], per_row: int
) -> Image.Image:
  """Rows of enlarged tiles with a gap between them and a name beside each row.

  Small images grow by a whole factor, pixel by pixel, so that they can be read.
  """
  count, height, width, _ = images.shape
  factor = max(1, -(-_TILE // max(height, width)))
  tile_h, tile_w = height * factor, width * factor
  font = ImageFont.load_default(size=24)
  margin = _GAP * 2 + max(round(font.getlength(name)) for name in names)
  rows = -(-count // per_row)
  sheet = Image.new(
    "RGB",
    (
      margin + per_row * (tile_w + _GAP) + _GAP,
      rows * (tile_h + _GAP) + _GAP,
    ),
    "white",
  )
  draw = ImageDraw.Draw(sheet)
  for row in range(rows):
    top = _GAP + row * (tile_h + _GAP)
    draw.text(
      (_GAP, top + tile_h / 2), names[row], fill="black", font=font, anchor="lm"
    )
    for column, image in enumerate(images[row * per_row : (row + 1) * per_row]):
      tile = _picture(image).resize((tile_w, tile_h), Image.Resampling.NEAREST)
      sheet.paste(tile, (margin + _GAP + column * (tile_w + _GAP), top))
  return sheet


def _picture(image: UInt8[np.ndarray, "h w C"]) -> Image.Image:
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
