"""Integrators from noise (t = 0) to data (t = 1) that thread a carry along.

ODE: dx = v dt, on any grid, in either direction. SDE of stochastic interpolants
(SiT, arXiv 2401.08740; its w is twice this one), with s the score and w any
diffusion, all with the same marginals: dx = [v + w(t) s] dt + sqrt(2 w(t)) dW.

A recurrent model moves its memory on with every call, so a step of several
stages keeps the carry of its first one: each noise level enters the memory
once. The later stages start from that carry and theirs is dropped.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError
from arflow_jax.flow import paths

Carry = Any
# (x [B, ...], t [], carry) -> (velocity [B, ...], carry)
Velocity = Callable[[jax.Array, jax.Array, Carry], tuple[jax.Array, Carry]]
# step index [] -> standard normal noise [B, ...]
Noise = Callable[[jax.Array], jax.Array]

# Explicit Runge-Kutta tableaux (Hairer, Norsett, Wanner, Solving ODEs I, table
# II.1.2 and p. 138): nodes, rows of coefficients, weights.
ODE_METHODS = {
  "euler": ((), (), (1,)),
  "midpoint": ((1 / 2,), ((1 / 2,),), (0, 1)),
  "heun2": ((1,), ((1,),), (1 / 2, 1 / 2)),
  "heun3": ((1 / 3, 2 / 3), ((1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
  # The 3/8 rule.
  "rk4": (
    (1 / 3, 2 / 3, 1),
    ((1 / 3,), (-1 / 3, 1), (1, -1, 1)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
  ),
}
SDE_METHODS = ("euler", "heun")

# w(t) by name, from the path, the time and the norm (SiT, appendix).
DIFFUSIONS: dict[str, Callable[[paths.Path, jax.Array, float], jax.Array]] = {
  "constant": lambda path, t, norm: norm * jnp.ones_like(t),
  "sbdm": lambda path, t, norm: norm * path.score_coefficient(t),
  "sigma": lambda path, t, norm: norm * path.sigma(t),
  "linear": lambda path, t, norm: norm * (1 - t),
  "decreasing": lambda path, t, norm: (
    0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2
  ),
  "increasing-decreasing": lambda path, t, norm: (
    norm * jnp.sin(jnp.pi * t) ** 2
  ),
}
# The end of an SDE by name: along the drift, along the velocity, to the data
# that the score expects, or nowhere.
LAST_STEPS = ("mean", "euler", "tweedie", "none")


def ode(
  velocity: Velocity | Sequence[Velocity],
  x: Any,
  carry: Carry,
  times: Float[Array, "K"],
  method: str,
) -> tuple[Any, Carry]:
  """An explicit Runge-Kutta method on a grid of K times: K - 1 steps.

  Calls the velocity K - 1 times the stages of the method (`euler` 1, `midpoint`
  and `heun2` 2, `heun3` 3, `rk4` 4).

  Args:
    velocity: the model, `(x, t, carry) -> (velocity, carry)`; or one for each
      step, where neighbours that are the same object share a loop.
    x: where to start, an array `[B, ...]`; or a tree of arrays, if `velocity`
      answers with such a tree.
    carry: the model's state before the first call.
    times: the grid, ascending, or descending to run from data to noise.
    method: a name in `ODE_METHODS`.

  Returns:
    x at the last time, and the carry.

  Raises:
    ConfigError: an unknown method.
    ValueError: velocities that are not one for each step.
  """
  _check_name("method", method, ODE_METHODS)
  nodes, rows, weights = ODE_METHODS[method]

  def step(velocity, x, carry, i):
    t, dt = times[i], times[i + 1] - times[i]
    v, carry = velocity(x, t, carry)
    slopes = [v]
    for node, row in zip(nodes, rows):
      v, _ = velocity(_move(x, dt, row, slopes), t + node * dt, carry)
      slopes.append(v)
    return _move(x, dt, weights, slopes), carry

  return _loop(step, velocity, x, carry, times.shape[0] - 1)


def adaptive_ode(
  velocity: Velocity,
  x: Any,
  times: Float[Array, "K"],
  *,
  rtol: float,
  atol: float,
  max_steps: int = 4096,
) -> Any:
  """Dormand-Prince 5(4) with adaptive steps, by diffrax, without a carry.

  The step size is one for the whole batch, so that an image depends on its
  batch within the tolerances. A model with memory has no meaning here: the
  number of its calls is not known, and rejected steps would enter the memory.

  Args:
    velocity: stateless, `(x, t, None) -> (velocity, None)`.
    x: where to start: an array or a tree of arrays.
    times: a grid in either direction, of which the two ends are used.
    rtol: relative tolerance of a step.
    atol: absolute tolerance of a step.
    max_steps: steps after which it gives up.

  Raises:
    RuntimeError: the end was not reached within `max_steps`.
  """
  import diffrax  # not needed by those who never come here

  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, x, _: velocity(x, t, None)[0]),
    diffrax.Dopri5(),
    times[0],
    times[-1],
    None,
    x,
    stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
    max_steps=max_steps,
  )
  return jax.tree.map(lambda leaf: leaf[-1], solution.ys)


def sde(
  velocity: Velocity | Sequence[Velocity],
  x: Float[Array, "B *rest"],
  carry: Carry,
  times: Float[Array, "K"],
  noise: Noise,
  *,
  method: str,
  path: paths.Path,
  diffusion: str,
  diffusion_norm: float,
  last_step: str,
  last_step_size: float,
) -> tuple[Float[Array, "B *rest"], Carry]:
  """K - 1 stochastic steps on an even grid of K times, then one last step.

  Calls the velocity once a step with `euler` (Euler-Maruyama) and twice with
  `heun` (noise first, then Heun's step of the drift), and once in the last
  step, which is made at `times[-1]` without noise.

  Args:
    velocity: the model, `(x, t, carry) -> (velocity, carry)`; or one for each
      step, where neighbours that are the same object share a loop.
    x: standard normal noise to start from.
    carry: the model's state before the first call.
    times: even, ascending grid over `intervals.sampling`; the published ARFlow
      uses 250 points from 0 to `1 - last_step_size`. The score is infinite at
      t = 1 (but for GVP): no drift may be asked for there, by a last step or by
      the second stage of `heun`.
    noise: the standard normal draw of step i, for i in 0 .. K - 2.
    method: `euler` or `heun`.
    path: the path the velocity belongs to.
    diffusion: name of w(t), a key of `DIFFUSIONS`.
    diffusion_norm: its magnitude.
    last_step: `mean` (along the drift), `euler` (along the velocity), `tweedie`
      (to the expected data) or `none` (no step and no call).
    last_step_size: size of a `mean` or `euler` step.

  Returns:
    The sample and the carry after the last call.

  Raises:
    ConfigError: an unknown method, diffusion or last step.
    ValueError: velocities that are not one for each step, or fewer than two
      times.
  """
  _check_name("method", method, SDE_METHODS)
  _check_name("diffusion", diffusion, DIFFUSIONS)
  _check_name("last_step", last_step, LAST_STEPS)
  count = times.shape[0]
  if count < 2:
    raise ValueError(f"an SDE needs at least two times, got {count}")
  steps = count - 1 if last_step == "none" else count
  if callable(velocity):
    velocity = [velocity] * steps
  _check_count(velocity, steps)
  dt = times[1] - times[0]

  def diffusion_at(t):
    return DIFFUSIONS[diffusion](path, t, diffusion_norm)

  def score(v, x, t):
    return path.score_from_velocity(v, x, jnp.broadcast_to(t, x.shape[:1]))

  def drift(velocity, x, t, carry):
    v, carry = velocity(x, t, carry)
    return v + diffusion_at(t) * score(v, x, t), carry

  def step(velocity, x, carry, i):
    t = times[i]
    kick = jnp.sqrt(2 * diffusion_at(t) * dt) * noise(i)
    if method == "euler":
      d, carry = drift(velocity, x, t, carry)
      return x + d * dt + kick, carry
    x = x + kick
    d, carry = drift(velocity, x, t, carry)
    d_end, _ = drift(velocity, x + dt * d, t + dt, carry)
    return x + dt / 2 * (d + d_end), carry

  x, carry = _loop(step, velocity[: count - 1], x, carry, count - 1)
  if last_step == "none":
    return x, carry
  t = times[-1]
  v, carry = velocity[-1](x, t, carry)
  if last_step == "mean":
    return x + last_step_size * (v + diffusion_at(t) * score(v, x, t)), carry
  if last_step == "euler":
    return x + last_step_size * v, carry
  return path.data_from_score(
    score(v, x, t), x, jnp.broadcast_to(t, x.shape[:1])
  ), carry


def _loop(step, velocity, x, carry, count):
  """`step(velocity, x, carry, i)` for each i, one scan a run of velocities."""
  if callable(velocity):
    velocity = [velocity] * count
  _check_count(velocity, count)
  begin = 0
  for _, run in itertools.groupby(velocity, key=id):
    run = list(run)

    def body(loop, i, velocity=run[0]):
      return step(velocity, *loop, i), None

    indices = jnp.arange(begin, begin + len(run))
    (x, carry), _ = jax.lax.scan(body, (x, carry), indices)
    begin += len(run)
  return x, carry


def _check_name(key, name, known):
  if name not in known:
    raise ConfigError(f"{key}={name!r} is unknown; choose from {sorted(known)}")


def _check_count(velocities, count):
  if len(velocities) != count:
    raise ValueError(f"{len(velocities)} velocities for {count} steps")


def _move(x, dt, weights, slopes):
  """x + dt * (weighted sum of slopes), over trees."""
  return jax.tree.map(
    lambda x, *slopes: (
      x + dt * sum(w * slope for w, slope in zip(weights, slopes) if w)
    ),
    x,
    *slopes,
  )
