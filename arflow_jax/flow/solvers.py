"""Integrators from noise (t = 0) to data (t = 1) that thread a carry along.

The velocity is called exactly once per drift, because a recurrent model moves
its memory on with every call. ODE: dx = v dt. SDE (SiT, arXiv 2401.08740,
eq. 5): dx = [v + w(t) s] dt + sqrt(2 w(t)) dW with s the score and w any
diffusion; all of them have the same marginals.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError
from arflow_jax.flow import paths

Carry = Any
# (x [B, h, w, C], t [], carry) -> (velocity [B, h, w, C], carry)
Velocity = Callable[[jax.Array, jax.Array, Carry], tuple[jax.Array, Carry]]
# step index [] -> standard normal noise [B, h, w, C]
Noise = Callable[[jax.Array], jax.Array]

# w(t) by name, from the path and the norm; more forms are more entries.
DIFFUSIONS: dict[str, Callable[[paths.Path, jax.Array, float], jax.Array]] = {
  "sigma": lambda path, t, norm: norm * path.sigma(t),
}
# The end of an SDE by name, from x, the drift there and the size of the step.
LAST_STEPS: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
  "mean": lambda x, drift, size: x + drift * size,
}


def check(diffusion: str, last_step: str) -> None:
  """Raises ConfigError where a name is not one of the forms offered here."""
  if diffusion not in DIFFUSIONS:
    raise ConfigError(
      f"diffusion={diffusion!r} is unknown; choose from {sorted(DIFFUSIONS)}"
    )
  if last_step not in LAST_STEPS:
    raise ConfigError(
      f"last_step={last_step!r} is unknown; choose from {sorted(LAST_STEPS)}"
    )


def euler(
  velocity: Velocity,
  x: Float[Array, "B h w C"],
  carry: Carry,
  times: Float[Array, "K"],
) -> tuple[Float[Array, "B h w C"], Carry]:
  """Euler's method for the ODE on a grid of K times: K - 1 velocity calls."""

  def step(loop, span):
    x, carry = loop
    t, t_next = span
    v, carry = velocity(x, t, carry)
    return (x + (t_next - t) * v, carry), None

  (x, carry), _ = jax.lax.scan(step, (x, carry), (times[:-1], times[1:]))
  return x, carry


def euler_maruyama(
  velocity: Velocity,
  x: Float[Array, "B h w C"],
  carry: Carry,
  times: Float[Array, "K"],
  noise: Noise,
  *,
  path: paths.Path = paths.LINEAR,
  diffusion: str = "sigma",
  diffusion_norm: float = 1.0,
  last_step: str = "mean",
  last_step_size: float = 0.04,
) -> tuple[Float[Array, "B h w C"], Carry]:
  """Euler-Maruyama on an even grid of K times, then one last step.

  Makes K velocity calls: K - 1 stochastic steps, and the last step at
  `times[-1]` along the mean, without noise.

  Args:
    velocity: the model, `(x, t, carry) -> (velocity, carry)`.
    x: standard normal noise to start from.
    carry: the model's state before the first call.
    times: even, ascending grid; the published ARFlow uses 250 points from 0 to
      `1 - last_step_size`.
    noise: the standard normal draw of step i, for i in 0 .. K - 2.
    path: the path the velocity belongs to.
    diffusion: name of w(t): `sigma`.
    diffusion_norm: factor on w(t).
    last_step: `mean`, one Euler step of the drift.
    last_step_size: its size, so that the end is `times[-1] + last_step_size`.

  Returns:
    The sample and the carry after the last call.

  Raises:
    ConfigError: an unknown diffusion or last step.
  """
  check(diffusion, last_step)
  dt = times[1] - times[0]

  def drift(x, t, carry):
    w = DIFFUSIONS[diffusion](path, t, diffusion_norm)
    v, carry = velocity(x, t, carry)
    lead = jnp.broadcast_to(t, x.shape[:1])
    return v + w * path.score_from_velocity(v, x, lead), w, carry

  def step(loop, inputs):
    x, carry = loop
    i, t = inputs
    d, w, carry = drift(x, t, carry)
    return (x + d * dt + jnp.sqrt(2 * w * dt) * noise(i), carry), None

  steps = (jnp.arange(times.shape[0] - 1), times[:-1])
  (x, carry), _ = jax.lax.scan(step, (x, carry), steps)
  d, _, carry = drift(x, times[-1], carry)
  return LAST_STEPS[last_step](x, d, last_step_size), carry
