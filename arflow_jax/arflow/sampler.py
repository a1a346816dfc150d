"""Drawing images with ARFlow: one denoising trajectory, one carried memory.

The images of the sequence are the successive states of the trajectory. Every
step advances the state of every layer once, from zeros at the start; the whole
loop is one compiled program.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from arflow_jax import values
from arflow_jax.arflow.network import ARFlow
from arflow_jax.flow import guidance as guidance_lib
from arflow_jax.flow import integrate, paths, solvers
from arflow_jax.flow.integrate import Integrator


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a trajectory is drawn.

  Attributes:
    num_steps: steps per image, an SDE's last step included.
    integrator: how they are made.
    guidance: outside its times the unconditional half is not computed and its
      memory stays as it is.

  Raises:
    ConfigError: fewer than two steps.
  """

  num_steps: int
  integrator: Integrator
  guidance: guidance_lib.Guidance

  def __post_init__(self):
    _ = self.times  # checks num_steps

  @classmethod
  def from_config(cls, sample: ConfigDict) -> "Settings":
    """The settings of a `sample` group.

    Raises:
      ConfigError: an unknown name, or a number out of range.
    """
    rules = integrate.RULES | guidance_lib.RULES
    values.check("sample.", sample.to_dict(), rules)
    return cls(
      sample.num_steps,
      Integrator(
        sample.method,
        sample.diffusion,
        sample.diffusion_norm,
        sample.last_step,
        sample.last_step_size,
      ),
      guidance_lib.Guidance(
        sample.guidance,
        (sample.guidance_low, sample.guidance_high),
        sample.guidance_channels,
      ),
    )

  @property
  def times(self) -> Float[np.ndarray, "K"]:
    """When steps start, and the end."""
    return self.integrator.times(self.num_steps, paths.LINEAR)


def guided_velocity(
  network: ARFlow,
  labels: Int[Array, "B"],
  guidance: guidance_lib.Guidance,
  times: Float[np.ndarray, "K"],
) -> tuple[list[solvers.Velocity], Float[Array, "L R ..."]]:
  """The network as a velocity for each time, and the carry to start from.

  The carry is the state of every layer for R rows: B without guidance, 2B with
  it, the conditional memories first, then the unconditional ones.
  """
  if guidance.inside(times).any():
    labels = guidance_lib.with_null(labels, network.config.num_classes)

  def velocity(x, t, state):
    rows = x.shape[0]
    t = jnp.full((rows, 1), t)
    v, moved = network(
      x[:, None], t, labels[:rows], state[:, :rows], opaque_state=True
    )
    return v[:, 0], jax.lax.dynamic_update_slice_in_dim(state, moved, 0, 1)

  state = network.init_state(len(labels), opaque_state=True)
  return guidance_lib.guide(velocity, guidance, times), state


def sample(
  network: ARFlow,
  keys: Key[Array, "B"],
  labels: Int[Array, "B"],
  settings: Settings,
) -> Float[Array, "B h w C"]:
  """Draws one image (or latent) per key and label.

  Args:
    network: with the weights to sample from.
    keys: one key per image: all its noise comes from it and from nothing else.
    labels: classes; `num_classes` samples without a class.
    settings: the integrator and its guidance.
  """
  config = network.config
  image = (config.image_size, config.image_size, config.channels)

  def noise(i):
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, i), image)
    return jax.vmap(draw)(keys)

  times = settings.times
  velocities, state = guided_velocity(
    network, labels, settings.guidance, times[:-1]
  )
  x, _ = settings.integrator(
    velocities, noise(0), state, times, lambda i: noise(i + 1), paths.LINEAR
  )
  return x
