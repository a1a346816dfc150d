"""Interpolation paths x_t = alpha(t) x1 + sigma(t) x0 from noise to data.

`t = 0` is noise (x0), `t = 1` is data (x1). The paths are those of stochastic
interpolants (SiT, arXiv 2401.08740, section 2): linear, generalised
variance-preserving (GVP) and variance-preserving diffusion (VP). Conversions
between velocity, score, noise and data follow from the path's coefficients.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_VP_BETA_MIN = 0.1
_VP_BETA_MAX = 20.0

Coefficient = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Path:
  """Coefficients of one path; each maps times in [0, 1] to same-shaped values.

  Attributes:
    name: `linear`, `gvp` or `vp`.
    alpha: weight of the data, 0 (VP: nearly 0) at t = 0 and 1 at t = 1.
    sigma: weight of the noise, 1 (VP: nearly 1) at t = 0 and 0 at t = 1.
    d_alpha: derivative of alpha with respect to t.
    d_sigma: derivative of sigma with respect to t.
    d_alpha_over_alpha: their ratio, in the form that is stable near t = 0.
  """

  name: str
  alpha: Coefficient
  sigma: Coefficient
  d_alpha: Coefficient
  d_sigma: Coefficient
  d_alpha_over_alpha: Coefficient

  def interpolate(
    self,
    x0: Float[Array, "*shape"],
    x1: Float[Array, "*shape"],
    t: Float[Array, "*lead"],
  ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Returns the noisy sample x_t and its velocity dx_t/dt.

    Args:
      x0: standard normal noise; its first axes are those of `t`.
      x1: data, same shape.
      t: one time in [0, 1] per image, `[B]` or, for sequences, `[B, S]`.
    """
    t = expand_times(t, x1)
    x = self.alpha(t) * x1 + self.sigma(t) * x0
    v = self.d_alpha(t) * x1 + self.d_sigma(t) * x0
    return x, v

  def score_coefficient(
    self, t: Float[Array, "*lead"]
  ) -> Float[Array, "*lead"]:
    """b(t) in `v = b s + f x`, with f = alpha'/alpha; b = f s^2 - s s'.

    Half the squared diffusion of the SDE that the path reverses (SBDM).
    Infinite at t = 0, but for VP.
    """
    sigma = self.sigma(t)
    if self.name == "linear":
      return sigma / t
    if self.name == "vp":  # half of beta, also where sigma vanishes
      return self.d_alpha_over_alpha(t)
    return self.d_alpha_over_alpha(t) * sigma**2 - sigma * self.d_sigma(t)

  def score_from_velocity(
    self,
    v: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    t: Float[Array, "*lead"],
  ) -> Float[Array, "*shape"]:
    """Score grad log p_t(x) that belongs to velocity `v` at `x`; t < 1."""
    t = expand_times(t, x)
    if self.name == "linear":  # closed form: no division by t
      return (t * v - x) / (1 - t)
    ratio = 1 / self.d_alpha_over_alpha(t)
    sigma = self.sigma(t)
    return (ratio * v - x) / (sigma**2 - ratio * self.d_sigma(t) * sigma)

  def noise_from_velocity(
    self,
    v: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    t: Float[Array, "*lead"],
  ) -> Float[Array, "*shape"]:
    """Expected noise x0 that belongs to velocity `v` at `x`."""
    t = expand_times(t, x)
    if self.name == "linear":
      return x - t * v
    ratio = 1 / self.d_alpha_over_alpha(t)
    return (ratio * v - x) / (ratio * self.d_sigma(t) - self.sigma(t))

  def velocity_from_score(
    self,
    score: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    t: Float[Array, "*lead"],
  ) -> Float[Array, "*shape"]:
    """Velocity of a score, `b s + f x`; t > 0, but for VP."""
    t = expand_times(t, x)
    return self.score_coefficient(t) * score + self.d_alpha_over_alpha(t) * x

  def velocity_from_noise(
    self,
    noise: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    t: Float[Array, "*lead"],
  ) -> Float[Array, "*shape"]:
    """Velocity of a noise prediction, by score = -noise / sigma; t < 1."""
    return self.velocity_from_score(
      -noise / self.sigma(expand_times(t, x)), x, t
    )

  def data_from_score(
    self,
    score: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    t: Float[Array, "*lead"],
  ) -> Float[Array, "*shape"]:
    """Expected data x1 given `x` (Tweedie's formula); t > 0, but for VP."""
    t = expand_times(t, x)
    return (x + self.sigma(t) ** 2 * score) / self.alpha(t)


def expand_times(
  t: Float[Array, "*lead"], x: Float[Array, "*shape"]
) -> Float[Array, "*expanded"]:
  """Appends singleton axes to `t` until it broadcasts against `x`."""
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def _vp_log_alpha(t: jax.Array) -> jax.Array:
  span = _VP_BETA_MAX - _VP_BETA_MIN
  return -0.25 * (1 - t) ** 2 * span - 0.5 * (1 - t) * _VP_BETA_MIN


def _vp_d_log_alpha(t: jax.Array) -> jax.Array:
  return 0.5 * (1 - t) * (_VP_BETA_MAX - _VP_BETA_MIN) + 0.5 * _VP_BETA_MIN


def _vp_sigma(t: jax.Array) -> jax.Array:
  return jnp.sqrt(-jnp.expm1(2 * _vp_log_alpha(t)))


LINEAR = Path(
  name="linear",
  alpha=lambda t: t,
  sigma=lambda t: 1 - t,
  d_alpha=jnp.ones_like,
  d_sigma=lambda t: -jnp.ones_like(t),
  d_alpha_over_alpha=lambda t: 1 / t,
)

GVP = Path(
  name="gvp",
  alpha=lambda t: jnp.sin(jnp.pi / 2 * t),
  sigma=lambda t: jnp.cos(jnp.pi / 2 * t),
  d_alpha=lambda t: jnp.pi / 2 * jnp.cos(jnp.pi / 2 * t),
  d_sigma=lambda t: -jnp.pi / 2 * jnp.sin(jnp.pi / 2 * t),
  d_alpha_over_alpha=lambda t: jnp.pi / (2 * jnp.tan(jnp.pi / 2 * t)),
)

VP = Path(
  name="vp",
  alpha=lambda t: jnp.exp(_vp_log_alpha(t)),
  sigma=_vp_sigma,
  d_alpha=lambda t: jnp.exp(_vp_log_alpha(t)) * _vp_d_log_alpha(t),
  d_sigma=lambda t: (
    -jnp.exp(2 * _vp_log_alpha(t)) * _vp_d_log_alpha(t) / _vp_sigma(t)
  ),
  d_alpha_over_alpha=_vp_d_log_alpha,
)

PATHS = {path.name: path for path in (LINEAR, GVP, VP)}
