"""Images to patch tokens and back, and the fixed position table of the tokens.

Tokens run in raster order (row-major); inside a token the features run
(row, column, channel), channel fastest, as in DiT (arXiv 2212.09748).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError


def patchify(
  images: Float[Array, "*lead h w C"], patch: int
) -> Float[Array, "*lead N P"]:
  """Cuts images into `N = (h/patch)(w/patch)` tokens of `P = patch^2 C`."""
  *lead, h, w, channels = images.shape
  x = images.reshape(*lead, h // patch, patch, w // patch, patch, channels)
  x = jnp.moveaxis(x, -3, -4)
  return x.reshape(*lead, -1, patch * patch * channels)


def unpatchify(
  tokens: Float[Array, "*lead N P"], patch: int, side: int
) -> Float[Array, "*lead h w C"]:
  """Inverse of `patchify` for square images of `side` patches a side."""
  *lead, _, features = tokens.shape
  channels = features // patch**2
  x = tokens.reshape(*lead, side, side, patch, patch, channels)
  x = jnp.moveaxis(x, -3, -4)
  return x.reshape(*lead, side * patch, side * patch, channels)


def sincos_table(side: int, width: int) -> Float[jax.Array, "N E"]:
  """2-D sine-cosine position table of a `side x side` token grid (DiT).

  The first half of the features encodes the column, the second half the row;
  each half holds sines, then cosines. Computed in float64, returned in float32.

  Raises:
    ConfigError: a width that four does not divide.
  """
  if width % 4:
    raise ConfigError(f"model.width={width} must be a multiple of 4")
  frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))
  angles = np.arange(side)[:, None] * frequencies
  axis = np.concatenate([np.sin(angles), np.cos(angles)], 1)
  table = np.concatenate(
    [np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)], 1
  )
  return jnp.asarray(table, jnp.float32)
