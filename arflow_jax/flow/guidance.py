"""Classifier-free guidance: its scale, time interval and channels.

Guided velocity = uncond + scale (cond - uncond) (arXiv 2207.12598). The
published ARFlow guides the first three channels of its four-channel latents
only, an inheritance from DiT; a limited interval follows arXiv 2404.07724.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError
from arflow_jax.flow.solvers import Velocity

Carry = Any
Pair = Callable[
  [jax.Array, jax.Array, Carry], tuple[jax.Array, jax.Array, Carry]
]


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Settings of classifier-free guidance.

  Attributes:
    scale: 1 means none; must not be negative.
    interval: times `low <= t <= high` at which it applies, within [0, 1].
    channels: guide only the first this many channels; None guides all.
  """

  scale: float = 1.0
  interval: tuple[float, float] = (0.0, 1.0)
  channels: int | None = None

  def __post_init__(self):
    low, high = self.interval
    if not 0 <= self.scale < math.inf:
      raise ConfigError(
        f"guidance={self.scale} must not be negative, and finite"
      )
    if not 0 <= low <= high <= 1:
      raise ConfigError(
        f"guidance interval ({low}, {high}) must satisfy 0 <= low <= high <= 1"
      )
    channels = self.channels
    if channels is not None and not (
      isinstance(channels, int) and channels > 0
    ):
      raise ConfigError(
        f"guidance_channels={self.channels} must be at least 1, or None for all"
      )

  def combine(
    self, cond: Float[Array, "*lead C"], uncond: Float[Array, "*lead C"]
  ) -> Float[Array, "*lead C"]:
    """The guided velocity; channels left out keep the conditional one."""
    guided = uncond + self.scale * (cond - uncond)
    if self.channels is None:
      return guided
    chosen = jnp.arange(cond.shape[-1]) < self.channels
    return jnp.where(chosen, guided, cond)


def guide(
  pair: Pair,
  single: Velocity,
  guidance: Guidance,
  times: Float[np.ndarray, "K"],
) -> list[Velocity]:
  """Builds the guided velocity, one for each time, of a model with state.

  The choice is made before the program is traced: outside the interval there is
  no unconditional half in it, so that guidance costs nothing there.

  Args:
    pair: `(x, t, carry) -> (cond, uncond, carry)`, both halves in one call.
    single: `(x, t, carry) -> (cond, carry)`, the conditional half alone.
    guidance: when and how the halves are combined.
    times: concrete times at which steps start; what `solvers` then take.

  Returns:
    For each time `(x, t, carry) -> (velocity, carry)`, one of two objects.
  """
  low, high = guidance.interval

  def guided(x, t, carry):
    cond, uncond, carry = pair(x, t, carry)
    return guidance.combine(cond, uncond), carry

  def inside(t):
    # A time that stands on a bound counts as inside, whatever its rounding.
    return guidance.scale != 1 and low - 1e-6 <= t <= high + 1e-6

  return [guided if inside(t) else single for t in times]
