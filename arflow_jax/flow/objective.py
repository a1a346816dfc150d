"""Training times and the velocity-matching loss (SiT, arXiv 2401.08740).

Every random draw belongs to one training item, so that nothing depends on how
a batch is split over devices or micro-batches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def sorted_uniform_times(key: Key[Array, ""], length: int) -> Float[Array, "S"]:
  """`length` times, uniform in [0, 1) and ascending: noisiest image first.

  ARFlow (arXiv 2501.16085) draws the noise levels of a sequence this way.
  """
  return jnp.sort(jax.random.uniform(key, (length,)))


def velocity_loss(
  prediction: Float[Array, "B *rest"], target: Float[Array, "B *rest"]
) -> Float[Array, "B"]:
  """Mean squared error over all but the first axis, in float32."""
  error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
