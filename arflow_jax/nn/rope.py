"""Two-dimensional rotary position embedding (arXiv 2104.09864) of square grids.

The first half of a head's features turns with the row, the second half with
the column; adjacent features make a pair. Positions are `index / side *
stretch`, so that grids of any side span the same range.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError

Table = tuple[Float[Array, "n D"], Float[Array, "n D"]]


def table(sides: tuple[int, ...], features: int, stretch: float) -> Table:
  """Cosines and sines for the tokens of one or more grids, one after another.

  Args:
    sides: side of each grid in tokens, row-major inside.
    features: D, size of a head.
    stretch: the range of positions that every side spans.

  Raises:
    ConfigError: a head size that is no multiple of 4.
  """
  if features % 4:
    raise ConfigError(
      f"a head of {features} features cannot be split for rotary embedding:"
      " width / heads must be a multiple of 4"
    )
  frequencies = 10000.0 ** -(np.arange(features // 4) * 4 / features)
  angles = []
  for side in sides:
    turns = np.arange(side)[:, None] / side * stretch * frequencies
    turns = np.repeat(turns, 2, axis=1)
    rows, columns = np.repeat(turns, side, axis=0), np.tile(turns, (side, 1))
    angles.append(np.concatenate([rows, columns], axis=1))
  angles = np.concatenate(angles)
  return (
    jnp.asarray(np.cos(angles), jnp.float32),
    jnp.asarray(np.sin(angles), jnp.float32),
  )


def rotate(x: Float[Array, "B n H D"], table: Table) -> Float[Array, "B n H D"]:
  """Turns queries or keys by the table of their tokens, in float32."""
  cosines, sines = (part[:, None] for part in table)
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
  out = x.astype(jnp.float32) * cosines + turned.reshape(x.shape) * sines
  return out.astype(x.dtype)
