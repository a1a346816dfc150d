"""Images by index: image i depends only on (seed, i, label, settings).

All images go through one compiled program over blocks of a fixed size, the last
block padded, so that on one kind of device an image is the same bit for bit
whichever images are asked for with it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from arflow_jax.branches import Branch
from arflow_jax.errors import ConfigError


def image_keys(seed: int, indices: Int[Array, "B"]) -> Key[Array, "B"]:
  """The key from which all the noise of each image is drawn."""
  key = jax.random.key(seed)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def to_pixels(
  images: Float[Array, "*lead h w C"],
) -> UInt8[Array, "*lead h w C"]:
  """[-1, 1] to 0..255 as the published code does: clamp(127.5 x + 128)."""
  return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)


class Generator:
  """Draws images of one branch with one set of weights and settings.

  Args:
    branch: the model family.
    params: the weights to sample from.
    settings: what `branch.settings` returned.
    block_size: images per compiled call.
    seed: of the noise.

  Attributes:
    settings: the same.
  """

  def __init__(
    self,
    branch: Branch,
    params: Any,
    settings: Any,
    *,
    block_size: int,
    seed: int = 0,
  ):
    if block_size < 1:
      raise ConfigError(f"sample.block_size={block_size} must be at least 1")
    self._branch, self._params = branch, params
    self.settings = settings
    self._block_size = block_size

    def draw(params, indices, labels):
      keys = image_keys(seed, indices)
      return to_pixels(branch.sample(params, keys, labels, settings))

    self._draw = jax.jit(draw)

  def blocks(
    self, labels: Int[np.ndarray, "n"], start: int = 0
  ) -> Iterator[UInt8[np.ndarray, "b h w C"]]:
    """Yields images `start .. start + n` in blocks; the last may be shorter.

    Raises:
      ConfigError: a label that the model does not have.
    """
    labels = np.asarray(labels, np.int32)
    check_labels(labels, self._branch.num_classes)
    for low in range(0, len(labels), self._block_size):
      chosen = labels[low : low + self._block_size]
      padded = np.resize(chosen, self._block_size)
      indices = start + low + np.arange(self._block_size)
      images = self._draw(self._params, jnp.asarray(indices), padded)
      yield np.asarray(images)[: len(chosen)]


def check_labels(labels: Int[np.ndarray, "n"], num_classes: int) -> None:
  """Raises ConfigError for labels outside 0 .. num_classes.

  `num_classes` itself is allowed: it samples without a class.
  """
  wrong = sorted({int(x) for x in labels if not 0 <= x <= num_classes})
  if wrong:
    raise ConfigError(
      f"labels {wrong} are out of range: this model has classes 0 to"
      f" {num_classes - 1}, and {num_classes} for none"
    )


def parse_labels(text: str) -> list[int]:
  """`"0-3,7"` to `[0, 1, 2, 3, 7]`.

  Raises:
    ConfigError: text that is not numbers and ranges.
  """
  labels = []
  for part in text.split(","):
    low, _, high = part.strip().partition("-")
    if not low.isdigit() or (high and not high.isdigit()):
      raise ConfigError(
        f"labels {text!r} are not numbers and ranges such as 0-3,7"
      )
    labels += range(int(low), int(high or low) + 1)
  if not labels:
    raise ConfigError(f"labels {text!r} name no class: low-high must ascend")
  return labels
