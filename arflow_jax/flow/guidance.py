"""Classifier-free guidance: its scale, time interval and channels.

Guided velocity = uncond + scale (cond - uncond) (arXiv 2207.12598). The
published ARFlow guides the first three channels of its four-channel latents
only, an inheritance from DiT; a limited interval follows arXiv 2404.07724.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from arflow_jax import values
from arflow_jax.errors import ConfigError
from arflow_jax.flow.solvers import Velocity

RULES = {
  "guidance": values.real("[0, 100]"),  # of more, samples are noise or overflow
  "guidance_low": values.SHARE,
  "guidance_high": values.SHARE,
  "guidance_channels": values.optional(values.SIZE),
}


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Settings of classifier-free guidance.

  Attributes:
    scale: 1 means none; within [0, 100].
    interval: times `low <= t <= high` at which it applies, within [0, 1].
    channels: guide only the first this many channels; None guides all.

  Raises:
    ConfigError: a number out of range.
  """

  scale: float
  interval: tuple[float, float]
  channels: int | None

  def __post_init__(self):
    low, high = self.interval
    mine = (self.scale, low, high, self.channels)
    values.check("sample.", dict(zip(RULES, mine)), RULES)
    if not low <= high:
      raise ConfigError(
        f"sample.guidance_low={low} must not exceed sample.guidance_high={high}"
      )

  def inside(self, times: Float[np.ndarray, "K"]) -> Bool[np.ndarray, "K"]:
    """At which times it applies, so that the unconditional half is needed."""
    low, high = self.interval
    # A time that stands on a bound counts as inside, whatever its rounding.
    within = (low - 1e-6 <= times) & (times <= high + 1e-6)
    return within & (self.scale != 1)

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
  velocity: Velocity, guidance: Guidance, times: Float[np.ndarray, "K"]
) -> list[Velocity]:
  """Builds the guided velocity, one for each time, of a model with state.

  The choice is made before the program is traced: outside the interval there is
  no unconditional half in it, so that guidance costs nothing there.

  Args:
    velocity: `(x [R, ...], t, carry) -> (velocity [R, ...], carry)`, for B rows
      the conditional half alone. Where any time lies inside, it is also called
      with 2B rows, the same x twice; then the second B are to be unconditional.
    guidance: when and how the halves are combined.
    times: concrete times at which steps start.

  Returns:
    For each time `(x [B, ...], t, carry) -> (velocity, carry)`, one of two
    objects.
  """

  def guided(x, t, carry):
    both, carry = velocity(jnp.concatenate([x, x]), t, carry)
    batch = x.shape[0]
    return guidance.combine(both[:batch], both[batch:]), carry

  return [guided if inside else velocity for inside in guidance.inside(times)]


def with_null(labels: Int[Array, "B"], null_label: int) -> Int[Array, "R"]:
  """The labels of both halves: as given, then as many null labels; R = 2B."""
  return jnp.concatenate([labels, jnp.full_like(labels, null_label)])


def drop_label(
  key: Key[Array, ""], label: Int[Array, ""], null_label: int, rate: float
) -> Int[Array, ""]:
  """For training: the label, or with probability `rate` the null label."""
  return jnp.where(jax.random.uniform(key) < rate, null_label, label)
