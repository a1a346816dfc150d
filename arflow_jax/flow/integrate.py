"""From a method's name and its settings to a solver, for every family.

A name is "ode" or "sde", followed by the integrator unless it is Euler's:
"ode-heun2". The settings are those of `solvers.sde`; their defaults
stand in the config files and nowhere else.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arflow_jax import values
from arflow_jax.errors import ConfigError
from arflow_jax.flow import intervals, solvers
from arflow_jax.flow.paths import Path

# Name to equation and to the solver's own name of the method.
METHODS = {
  equation if method == "euler" else f"{equation}-{method}": (equation, method)
  for equation, methods in (
    ("sde", solvers.SDE_METHODS),
    ("ode", solvers.ODE_METHODS),
  )
  for method in methods
}


RULES = {
  "num_steps": values.whole(2, 100_000),
  "method": values.one_of(*METHODS),
  "diffusion": values.one_of(*solvers.DIFFUSIONS),
  "diffusion_norm": values.real("(0, 1000]"),
  "last_step": values.one_of(*solvers.LAST_STEPS),
  "last_step_size": values.real("(0, 1)"),
}


@dataclasses.dataclass(frozen=True)
class Integrator:
  """How samples are carried from noise to data.

  Attributes:
    method: a key of `METHODS`: "sde" (Euler-Maruyama), "ode" (Euler) or one of
      more stages, each of which evaluates the velocity.
    diffusion: form of the SDE's diffusion w(t), a key of `solvers.DIFFUSIONS`.
    diffusion_norm: its magnitude.
    last_step: how the SDE ends, a name in `solvers.LAST_STEPS`.
    last_step_size: length of that step; the SDE stops at 1 minus this.

  Raises:
    ConfigError: an unknown name, a number out of range, or two that do not go
      together.
  """

  method: str
  diffusion: str
  diffusion_norm: float
  last_step: str
  last_step_size: float

  def __post_init__(self):
    values.check("sample.", vars(self), RULES)
    if (self.method, self.last_step) == ("sde-heun", "none"):
      raise ConfigError(
        "sample.last_step='none' does not go with sample.method='sde-heun',"
        " whose last stage would ask for the score at t = 1; choose 'mean'"
      )

  def times(
    self, num_steps: int, path: Path, prediction: str = "velocity"
  ) -> Float[np.ndarray, "K"]:
    """The float32 times at which steps start, and the end.

    There are `num_steps` steps, an SDE's last step included; one fewer where
    the last step is "none".

    Args:
      num_steps: at least 2.
      path: the path the velocity belongs to.
      prediction: what the network predicts, a name in `objective.PREDICTIONS`.

    Raises:
      ConfigError: too few steps, or an unknown prediction.
    """
    RULES["num_steps"]("sample.num_steps", num_steps)
    if METHODS[self.method][0] == "ode":
      low, high = intervals.sampling(path, prediction)
      return np.linspace(low, high, num_steps + 1, dtype=np.float32)
    last = 0.0 if self.last_step == "none" else self.last_step_size
    low, high = intervals.sampling(
      path, prediction, diffusion=self.diffusion, last_step_size=last
    )
    times = np.linspace(low, high, num_steps, dtype=np.float32)
    return np.append(times, np.float32(1)) if last else times

  def __call__(
    self,
    velocities: Sequence[solvers.Velocity],
    x: Float[Array, "B *rest"],
    carry: solvers.Carry,
    times: Float[np.ndarray, "K"],
    noise: solvers.Noise,
    path: Path,
  ) -> tuple[Float[Array, "B *rest"], solvers.Carry]:
    """Integrates over `times`.

    Args:
      velocities: one for each of `times[:-1]`; see `solvers`.
      x: standard normal noise to start from.
      carry: the model's state before the first call.
      times: when steps start, and the end. For an ODE any grid; for an SDE
        evenly spaced up to the last step, whose length is `last_step_size`,
        whatever the final time.
      noise: the standard normal draw of each step of an SDE but the last.
      path: the path the velocities belong to.

    Returns:
      The samples, and the carry after the last call.
    """
    equation, method = METHODS[self.method]
    times = np.asarray(times, np.float32)
    if equation == "ode":
      return solvers.ode(velocities, x, carry, jnp.asarray(times), method)
    grid = times if self.last_step == "none" else times[:-1]
    return solvers.sde(
      velocities,
      x,
      carry,
      jnp.asarray(grid),
      noise,
      method=method,
      path=path,
      diffusion=self.diffusion,
      diffusion_norm=self.diffusion_norm,
      last_step=self.last_step,
      last_step_size=self.last_step_size,
    )
