"""Scales and the resize operators between them (FlowAR, arXiv 2412.15205).

A scale of side s holds s x s tokens of `patch_size` pixels a side. Its target
is the area mean of the whole latent; what the transformer reads before scale s
is the scale below, bicubic to the full side, then area to s. All operators are
separable, linear and fixed: a matrix M, applied as M X M^T.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError
from arflow_jax.nn import patches


def area_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "out in"]:
  """Adaptive average pooling: bins of equal width, rounded outwards."""
  matrix = np.zeros((outputs, inputs))
  for o in range(outputs):
    low, high = o * inputs // outputs, -(-(o + 1) * inputs // outputs)
    matrix[o, low:high] = 1 / (high - low)
  return matrix


def bicubic_matrix(inputs: int, outputs: int) -> Float[np.ndarray, "out in"]:
  """Keys' kernel with a = -0.75, half-pixel centres, edges clamped.

  As PyTorch does it; `jax.image.resize` has a = -0.5 and other edges.
  """
  a = -0.75
  matrix = np.zeros((outputs, inputs))
  for o in range(outputs):
    position = (o + 0.5) * inputs / outputs - 0.5
    base = int(np.floor(position))
    for i in range(base - 1, base + 3):
      z = abs(position - i)
      if z <= 1:
        weight = (a + 2) * z**3 - (a + 3) * z**2 + 1
      else:
        weight = a * z**3 - 5 * a * z**2 + 8 * a * z - 4 * a
      matrix[o, min(max(i, 0), inputs - 1)] += weight
  return matrix


def resize(
  x: Float[Array, "*lead h w C"], matrix: Float[np.ndarray, "out in"]
) -> Float[Array, "*lead out out C"]:
  """Applies a resize matrix to both sides of square images, in float32."""
  m = jnp.asarray(matrix, jnp.float32)
  return jnp.einsum("oh,...hwc,pw->...opc", m, x, m, precision="highest")


@dataclasses.dataclass(frozen=True)
class Pyramid:
  """The scales of one latent size.

  Attributes:
    scales: sides in tokens, each twice the one before.
    patch_size: pixels along one side of a token.

  Raises:
    ConfigError: scales that do not double.
  """

  scales: tuple[int, ...]
  patch_size: int = 1

  def __post_init__(self):
    whole = all(type(side) is int and side > 0 for side in self.scales)
    doubles = whole and all(
      b == 2 * a for a, b in itertools.pairwise(self.scales)
    )
    if not self.scales or not doubles:
      raise ConfigError(
        f"model.scales={self.scales} must be whole numbers that double from one"
        " to the next, such as (1, 2, 4, 8)"
      )

  @property
  def side(self) -> int:
    """Pixels along one side of the whole latent."""
    return self.scales[-1] * self.patch_size

  @property
  def lengths(self) -> tuple[int, ...]:
    """Tokens of each scale."""
    return tuple(s * s for s in self.scales)

  @property
  def weights(self) -> tuple[float, ...]:
    """Weight of each scale in the loss, (s / last s)^2."""
    return tuple((s / self.scales[-1]) ** 2 for s in self.scales)

  def targets(
    self, latents: Float[Array, "B h w C"]
  ) -> list[Float[Array, "B _ _ C"]]:
    """What each scale shall draw: area means of the finest latent."""
    return [
      resize(latents, area_matrix(self.side, s * self.patch_size))
      for s in self.scales
    ]

  def next_input(
    self, x: Float[Array, "B s s C"], index: int
  ) -> Float[Array, "B r r C"]:
    """What the transformer reads for scale `index`, from the scale below."""
    below, size = x.shape[-2], self.scales[index] * self.patch_size
    return resize(x, _upsample_matrix(below, self.side, size))

  def tokens(self, x: Float[Array, "B s s C"]) -> Float[Array, "B n P"]:
    """Cuts a scale into tokens of (channel, row, column), as published."""
    p = self.patch_size
    x = patches.patchify(x, p)
    split = x.reshape(*x.shape[:-1], p * p, -1)
    return jnp.swapaxes(split, -1, -2).reshape(x.shape)

  def image(self, tokens: Float[Array, "B n P"]) -> Float[Array, "B s s C"]:
    """Inverse of `tokens`."""
    p, side = self.patch_size, round(tokens.shape[-2] ** 0.5)
    split = tokens.reshape(*tokens.shape[:-1], -1, p * p)
    x = jnp.swapaxes(split, -1, -2).reshape(tokens.shape)
    return patches.unpatchify(x, p, side)


@functools.cache
def _upsample_matrix(below, side, size):
  return area_matrix(side, size) @ bicubic_matrix(below, side)
