"""Exact likelihood and inversion of data by the probability-flow ODE.

From data at t = 1 to noise at t = 0 along a stateless velocity, with the log
density changing by the divergence of the velocity (FFJORD, arXiv 1810.01367).
Hutchinson's estimate of the divergence uses one probe for the whole trajectory,
so that the integrand is smooth and adaptive solvers keep their order.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError
from arflow_jax.flow import solvers
from arflow_jax.flow.solvers import Velocity


def with_divergence(
  velocity: Velocity, probe: Float[Array, "B *rest"]
) -> Velocity:
  """The velocity of the pair (x, log density gained on the way).

  Args:
    velocity: stateless, `(x, t, carry) -> (velocity, carry)`, without guidance:
      a guided velocity is no flow of a density that was learnt.
    probe: random signs shaped like x, or any draws with unit covariance.

  Returns:
    `((x, gain [B]), t, carry) -> ((v, probe . (dv/dx) probe), carry)`.
  """

  def augmented(state, t, carry):
    x, _ = state
    v, slope, carry = jax.jvp(
      lambda x: velocity(x, t, carry), (x,), (probe,), has_aux=True
    )
    divergence = jnp.sum(probe * slope, axis=tuple(range(1, x.ndim)))
    return (v, divergence), carry

  return augmented


def normal_log_density(x: Float[Array, "B *rest"]) -> Float[Array, "B"]:
  """Log density of each item under the standard normal, in nats."""
  x = x.reshape(x.shape[0], -1)
  constant = x.shape[1] * math.log(2 * math.pi)
  return -0.5 * (jnp.sum(x**2, axis=1) + constant)


def log_likelihood(
  velocity: Velocity,
  data: Float[Array, "B *rest"],
  probe: Float[Array, "B *rest"],
  times: Float[Array, "K"],
  *,
  method: str = "dopri5",
  rtol: float = 1e-3,
  atol: float = 1e-6,
) -> tuple[Float[Array, "B"], Float[Array, "B *rest"]]:
  """Log density of data in nats, and the noise that the flow draws it from.

  Args:
    velocity: stateless, `(x, t, None) -> (velocity, None)`, unguided.
    data: where to start, at `times[0]`.
    probe: random signs, `jax.random.rademacher(key, data.shape, float)`: an
      unbiased estimate, exact where the Jacobian is diagonal.
    times: descending grid from data to noise, over `intervals.sampling` with
      `reverse=True`; `dopri5` uses its two ends.
    method: `dopri5`, or a fixed-step name in `solvers.ODE_METHODS`.
    rtol: relative tolerance of `dopri5`.
    atol: absolute tolerance of `dopri5`.

  Returns:
    Log densities, and noise shaped like the data: integrating the ODE from it
    gives the data back.

  Raises:
    ConfigError: an unknown method.
  """
  if method not in ("dopri5", *solvers.ODE_METHODS):
    raise ConfigError(
      f"method={method!r} is unknown; choose 'dopri5' or one of"
      f" {sorted(solvers.ODE_METHODS)}"
    )
  augmented = with_divergence(velocity, probe)
  start = (data, jnp.zeros(data.shape[:1]))
  if method == "dopri5":
    noise, gain = solvers.adaptive_ode(
      augmented, start, times, rtol=rtol, atol=atol
    )
  else:
    (noise, gain), _ = solvers.ode(augmented, start, None, times, method)
  return normal_log_density(noise) + gain, noise
