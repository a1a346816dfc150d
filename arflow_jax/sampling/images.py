"""Images by index: image i depends only on (seed, i, label, settings).

All images go through one compiled program over blocks of a fixed size, the last
block padded, so that on one kind of device an image is the same bit for bit
whichever images are asked for with it. The rows of a block are split over all
devices of a mesh and stay there until somebody fetches them.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8, UInt32
from ml_collections import ConfigDict

from arflow_jax import values
from arflow_jax.branches import Branch
from arflow_jax.data import sources
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.parallel import processes

Decode = Callable[[Float[Array, "B h w C"]], UInt8[Array, "B p q K"]]


class Block(NamedTuple):
  """Some images, still on the devices.

  Attributes:
    indices: number of each image.
    labels: class of each image.
    images: over all devices of all processes; rows from n on only fill the
      block, so that every block has the same shape.
    finite: whether what was drawn is, in all processes alike.
  """

  indices: Int[np.ndarray, "n"]
  labels: Int[np.ndarray, "n"]
  images: UInt8[Array, "b p q K"]
  finite: Bool[Array, ""]

  def local(
    self,
  ) -> tuple[
    Int[np.ndarray, "m"], Int[np.ndarray, "m"], UInt8[np.ndarray, "m p q K"]
  ]:
    """Indices, labels and images of the rows that this process has to write.

    Every image belongs to one process.

    Raises:
      FloatingPointError: as `whole`.
    """
    self._check()
    rows, images = processes.local(self.images)
    real = rows < len(self.indices)
    rows = rows[real]
    return self.indices[rows], self.labels[rows], images[real]

  def whole(self) -> UInt8[np.ndarray, "n p q K"]:
    """All images, in every process; all have to call it.

    Raises:
      FloatingPointError: samples that are not finite, whose pixels are noise.
    """
    self._check()
    return processes.whole(self.images)[: len(self.indices)]

  def _check(self) -> None:
    if not self.finite:
      raise FloatingPointError(
        f"samples among images {self.indices[0]} to {self.indices[-1]} are not"
        " finite: the averaged weights are damaged, or the sample settings"
        " (guidance, num_steps, method) make these overflow"
      )


def image_keys(
  seed: int | UInt32[Array, ""], indices: Int[Array, "B"]
) -> Key[Array, "B"]:
  """The key from which all the noise of each image is drawn."""
  key = jax.random.key(seed)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def to_pixels(
  images: Float[Array, "*lead h w C"],
) -> UInt8[Array, "*lead h w C"]:
  """[-1, 1] to 0..255 as the published code does: clamp(127.5 x + 128)."""
  return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)


def from_pixels(
  images: UInt8[np.ndarray, "*lead h w C"],
) -> Float[np.ndarray, "*lead h w C"]:
  """The inverse of `to_pixels`, up to what it rounds and clamps; float32."""
  return (images.astype(np.float32) - 128) / 127.5


def decoder(config: ConfigDict, shape: tuple[int, int, int]) -> Decode:
  """The function that turns samples into uint8 pixels.

  Args:
    config: of a run; its data says what the model has learnt to draw.
    shape: of one image, `[h, w, C]`.

  Raises:
    ConfigError: samples that are not pixels, of grey or of three colours.
  """
  if not sources.kind(config).pixels or shape[-1] not in (1, 3):
    size = " x ".join(map(str, shape))
    raise ConfigError(
      f"this run draws {size} arrays (data.source={config.data.source!r}) that"
      " are not pixels; a picture of them needs a decoder, and this version has"
      " none"
    )
  return to_pixels


class Generator:
  """Draws images of one branch with one set of weights and settings.

  Args:
    branch: the model family.
    params: the weights to sample from, on the devices of `mesh`.
    settings: what `branch.settings` returned.
    block_size: images per compiled call; rounded up to a multiple of the
      devices.
    seed: of the noise.
    mesh: the devices that share a block.
    decode: turns what the branch samples into uint8 pixels.

  Attributes:
    settings: the same.
    image_shape: of a decoded image, `[p, q, K]`.

  Raises:
    ConfigError: a block without an image, or a seed out of range.
  """

  def __init__(
    self,
    branch: Branch,
    params: Any,
    settings: Any,
    *,
    block_size: int,
    seed: int = 0,
    mesh: Mesh,
    decode: Decode,
  ):
    values.SHARED["sample.block_size"]("sample.block_size", block_size)
    values.SEED("seed", seed)
    self.settings = settings
    self._branch, self._params, self._mesh = branch, params, mesh
    self._seed = np.uint32(seed)
    self._rows = rows(block_size, mesh)
    drawn = jax.ShapeDtypeStruct((1, *branch.image_shape), jnp.float32)
    self.image_shape = jax.eval_shape(decode, drawn).shape[1:]
    self._draw = program(branch, settings, mesh, decode)

  def compile(self) -> None:
    """Compiles the program of all blocks now; weights may be but shapes."""
    sharding = mesh_lib.batch_sharding(self._mesh)
    row = jax.ShapeDtypeStruct((self._rows,), jnp.int32, sharding=sharding)
    block = {"indices": row, "labels": row}
    with jax.set_mesh(self._mesh):
      self._draw.lower(self._params, block, self._seed).compile()

  def blocks(
    self,
    labels: Sequence[Any] | Shaped[np.ndarray, "..."],
    indices: Sequence[Any] | Shaped[np.ndarray, "..."] | None = None,
  ) -> Iterator[Block]:
    """Yields the images in blocks, in order; only the last is not full.

    Args:
      labels: class of each image; `num_classes` samples without a class.
      indices: number of each image; 0 .. n - 1 if None.

    Raises:
      ConfigError: labels that are no classes of the model, or indices that are
        no numbers of images, one for each label.
    """
    labels = check_labels(labels, self._branch.num_classes)
    indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
    if not (
      indices.shape == labels.shape
      and np.issubdtype(indices.dtype, np.integer)
      and ((indices >= 0) & (indices < 2**31)).all()
    ):
      raise ConfigError(
        f"indices must be {len(labels)} whole numbers, one for each label, from"
        f" 0 to {2**31 - 1}"
      )
    return self._blocks(labels, indices.astype(np.int32))

  def _blocks(self, labels, indices):
    sharding = mesh_lib.batch_sharding(self._mesh)
    mine = processes.rows(sharding, self._rows)
    for low in range(0, len(labels), self._rows):
      real = {
        "indices": indices[low : low + self._rows],
        "labels": labels[low : low + self._rows],
      }
      # Repeats the block's own rows, so that labels and indices stay valid.
      local = {k: np.resize(x, self._rows)[mine] for k, x in real.items()}
      block = processes.place(sharding, local, self._rows)
      with jax.set_mesh(self._mesh):  # kernels split themselves over it
        images, finite = self._draw(self._params, block, self._seed)
      yield Block(**real, images=images, finite=finite)


def rows(block_size: int, mesh: Mesh) -> int:
  """Images of a compiled call: every device draws as many as any other."""
  return -(-block_size // mesh.size) * mesh.size


@functools.lru_cache(maxsize=16)
def program(
  branch: Branch, settings: Any, mesh: Mesh, decode: Decode
) -> Callable[..., tuple[UInt8[Array, "b p q K"], Bool[Array, ""]]]:
  """The jitted drawing of a block, one for all generators that agree.

  Args:
    branch: the model family.
    settings: what `branch.settings` returned.
    mesh: the devices that share a block.
    decode: turns what the branch samples into uint8 pixels.

  Returns:
    `(params, {"indices", "labels"}, seed)` to the images, and whether all that
    was drawn is finite.
  """

  def draw(params, block, seed):
    keys = image_keys(seed, block["indices"])
    samples = branch.sample(params, keys, block["labels"], settings)
    return decode(samples), jnp.isfinite(samples).all()

  split, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
  return jax.jit(draw, out_shardings=(split, whole))


def check_labels(
  labels: Sequence[Any] | Shaped[np.ndarray, "..."], num_classes: int
) -> Int[np.ndarray, "n"]:
  """Labels as int32 numbers.

  `num_classes` itself is allowed: it samples without a class.

  Raises:
    ConfigError: labels that are no integers, or outside 0 .. num_classes.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise ConfigError(f"labels {labels.tolist()} must be whole numbers")
  wrong = sorted({int(x) for x in labels if not 0 <= x <= num_classes})
  if wrong:
    more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    raise ConfigError(
      f"labels {wrong[:8]}{more} are out of range: this model has classes 0 to"
      f" {num_classes - 1}, and {num_classes} for none"
    )
  return labels.astype(np.int32)


def parse_labels(text: str) -> list[int]:
  """`"0-3,7"` to `[0, 1, 2, 3, 7]`.

  Raises:
    ConfigError: text that is not numbers, of at most six digits, and ranges.
  """
  labels = []
  for part in text.split(","):
    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
    if not found:
      raise ConfigError(
        f"labels {text!r} are not numbers (of at most six digits) and ranges"
        " such as 0-3,7"
      )
    low, high = found.groups()
    labels += range(int(low), int(high or low) + 1)
  if not labels:
    raise ConfigError(f"labels {text!r} name no class: low-high must ascend")
  return labels
