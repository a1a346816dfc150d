"""Training times and the velocity, noise and score objectives.

Stochastic interpolants (SiT, arXiv 2401.08740, section 2.2 and appendix). What
a network predicts is one of `PREDICTIONS`; everything else in `flow` speaks
velocity, and `to_velocity` is the one place that converts. Every random draw
belongs to one training item, so that nothing depends on how a batch is split
over devices or micro-batches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from arflow_jax.errors import ConfigError
from arflow_jax.flow.paths import Path, expand_times
from arflow_jax.flow.solvers import Carry, Velocity

PREDICTIONS = ("velocity", "noise", "score")
WEIGHTS = ("none", "velocity", "likelihood")


def uniform_times(
  key: Key[Array, ""], interval: tuple[float, float] = (0.0, 1.0)
) -> Float[Array, ""]:
  """One time, uniform in [t0, t1) of `interval` (`intervals.training`)."""
  low, high = interval
  return low + (high - low) * jax.random.uniform(key)


def sorted_uniform_times(key: Key[Array, ""], length: int) -> Float[Array, "S"]:
  """`length` times, uniform in [0, 1) and ascending: noisiest image first.

  ARFlow (arXiv 2501.16085) draws the noise levels of a sequence this way.
  """
  return jnp.sort(jax.random.uniform(key, (length,)))


def velocity_loss(
  prediction: Float[Array, "B *rest"], target: Float[Array, "B *rest"]
) -> Float[Array, "B"]:
  """Mean squared error over all but the first axis, in float32."""
  return _mean_square(prediction, target)


def noise_loss(
  prediction: Float[Array, "B *rest"],
  x0: Float[Array, "B *rest"],
  t: Float[Array, "*lead"],
  path: Path,
  weight: str = "none",
) -> Float[Array, "B"]:
  """Weighted mean of (prediction - x0)^2 over all but the first axis.

  Args:
    prediction: what the network says the noise is.
    x0: the noise.
    t: one time per image, `[B]` or `[B, S]`, inside `intervals.training`.
    path: the interpolation path.
    weight: a name in `WEIGHTS`: 1, (b / sigma)^2 or b / sigma^2.

  Raises:
    ConfigError: an unknown weight.
  """
  return _mean_square(prediction, x0, _weight(weight, path, t, prediction))


def score_loss(
  prediction: Float[Array, "B *rest"],
  x0: Float[Array, "B *rest"],
  t: Float[Array, "*lead"],
  path: Path,
  weight: str = "none",
) -> Float[Array, "B"]:
  """Weighted mean of (sigma prediction + x0)^2; arguments as `noise_loss`.

  Raises:
    ConfigError: an unknown weight.
  """
  sigma = path.sigma(expand_times(t, prediction))
  scale = _weight(weight, path, t, prediction)
  return _mean_square(sigma * prediction, -x0, scale)


def _weight(name, path, t, like):
  t = expand_times(t, like)
  if name == "none":
    return 1.0
  if name == "velocity":
    return (path.score_coefficient(t) / path.sigma(t)) ** 2
  if name == "likelihood":
    return path.score_coefficient(t) / path.sigma(t) ** 2
  raise ConfigError(f"weight={name!r} is unknown; choose from {WEIGHTS}")


def _mean_square(a, b, weight=1.0):
  error = a.astype(jnp.float32) - b.astype(jnp.float32)
  return jnp.mean(weight * error**2, axis=tuple(range(1, error.ndim)))


def to_velocity(prediction: str, model: Velocity, path: Path) -> Velocity:
  """The velocity of a model that predicts velocity, noise or score.

  Calls the model once per velocity, so that a recurrent model stays in step.

  Args:
    prediction: a name in `PREDICTIONS`.
    model: `(x [B, ...], t [], carry) -> (prediction, carry)`.
    path: the path it was trained on.

  Raises:
    ConfigError: an unknown prediction.
  """
  if prediction == "velocity":
    return model
  if prediction not in PREDICTIONS:
    raise ConfigError(
      f"prediction={prediction!r} is unknown; choose from {PREDICTIONS}"
    )
  convert = {
    "noise": path.velocity_from_noise,
    "score": path.velocity_from_score,
  }[prediction]

  def velocity(x, t, carry: Carry):
    output, carry = model(x, t, carry)
    return convert(output, x, jnp.broadcast_to(t, x.shape[:1])), carry

  return velocity
