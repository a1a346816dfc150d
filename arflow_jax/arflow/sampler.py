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

from arflow_jax.arflow.network import ARFlow
from arflow_jax.errors import ConfigError
from arflow_jax.flow import guidance as guidance_lib
from arflow_jax.flow import intervals, paths, solvers

# The equation, and its integrator where that is not Euler's.
METHODS = (
  "sde",
  "sde-heun",
  "ode",
  *(f"ode-{name}" for name in solvers.ODE_METHODS if name != "euler"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a trajectory is integrated; the defaults are the published ones.

  Attributes:
    method: a name in `METHODS`: "sde" (Euler-Maruyama), "ode" (Euler) or one of
      more stages, each stage a network evaluation.
    num_steps: steps per image, an SDE's last step included.
    diffusion: form of the SDE's diffusion w(t), a key of `solvers.DIFFUSIONS`.
    diffusion_norm: its magnitude.
    last_step: how the SDE ends, a name in `solvers.LAST_STEPS`; "none" takes
      num_steps - 1 steps.
    last_step_size: length of that step; the SDE stops at 1 minus this.
    guidance: classifier-free guidance scale; 1 means none.
    guidance_low: lower end of the times at which guidance applies. Outside, the
      unconditional half is not computed and its memory stays as it is.
    guidance_high: upper end of those times.
    guidance_channels: guide the first this many channels; None guides all.
  """

  method: str = "sde"
  num_steps: int = 250
  diffusion: str = "sigma"
  diffusion_norm: float = 1.0
  last_step: str = "mean"
  last_step_size: float = 0.04
  guidance: float = 1.0
  guidance_low: float = 0.0
  guidance_high: float = 1.0
  guidance_channels: int | None = None

  def __post_init__(self):
    if self.method not in METHODS:
      raise ConfigError(
        f"sample.method={self.method!r} is unknown; choose from {METHODS}"
      )
    if self.num_steps < 2:
      raise ConfigError(f"sample.num_steps={self.num_steps} must be at least 2")
    if not 0 < self.last_step_size < 1:
      raise ConfigError(
        f"sample.last_step_size={self.last_step_size} must lie in (0, 1)"
      )
    if not self.diffusion_norm > 0:
      raise ConfigError(
        f"sample.diffusion_norm={self.diffusion_norm} must be positive"
      )
    solvers.check(self.diffusion, self.last_step)
    if (self.method, self.last_step) == ("sde-heun", "none"):
      raise ConfigError(
        "sample.last_step='none' does not go with sample.method='sde-heun',"
        " whose last stage would ask for the score at t = 1; choose 'mean'"
      )
    self.classifier_free()  # checks itself

  def classifier_free(self) -> guidance_lib.Guidance:
    """The guidance these settings ask for."""
    return guidance_lib.Guidance(
      self.guidance,
      (self.guidance_low, self.guidance_high),
      self.guidance_channels,
    )


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
  config = network.config
  batch = labels.shape[0]
  null = jnp.full_like(labels, config.num_classes)

  def call(x, t, labels, state):
    t = jnp.full((x.shape[0], 1), t)
    v, state = network(x[:, None], t, labels, state, opaque_state=True)
    return v[:, 0], state

  def pair(x, t, state):
    both = jnp.concatenate([labels, null])
    v, state = call(jnp.concatenate([x, x]), t, both, state)
    return v[:batch], v[batch:], state

  def single(x, t, state):
    v, cond = call(x, t, labels, state[:, :batch])
    return v, jax.lax.dynamic_update_slice_in_dim(state, cond, 0, 1)

  velocities = guidance_lib.guide(pair, single, guidance, times)
  rows = batch if all(v is single for v in velocities) else 2 * batch
  image = jnp.zeros(
    (rows, config.image_size, config.image_size, config.channels)
  )
  like = jax.eval_shape(call, image, 0.0, jnp.zeros(rows, jnp.int32), None)[1]
  return velocities, jnp.zeros(like.shape, like.dtype)


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

  guidance = settings.classifier_free()
  equation, _, method = settings.method.partition("-")
  method = method or "euler"
  if equation == "ode":
    low, high = intervals.sampling(paths.LINEAR)
    times = np.linspace(low, high, settings.num_steps + 1, dtype=np.float32)
    velocities, state = guided_velocity(network, labels, guidance, times[:-1])
    times = jnp.asarray(times)
    return solvers.ode(velocities, noise(0), state, times, method)[0]
  low, high = intervals.sampling(
    paths.LINEAR,
    diffusion=settings.diffusion,
    last_step_size=(
      0.0 if settings.last_step == "none" else settings.last_step_size
    ),
  )
  times = np.linspace(low, high, settings.num_steps, dtype=np.float32)
  velocities, state = guided_velocity(network, labels, guidance, times)
  x, _ = solvers.sde(
    velocities,
    noise(0),
    state,
    jnp.asarray(times),
    lambda i: noise(i + 1),
    method=method,
    diffusion=settings.diffusion,
    diffusion_norm=settings.diffusion_norm,
    last_step=settings.last_step,
    last_step_size=settings.last_step_size,
  )
  return x
