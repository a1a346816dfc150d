"""Integrators on velocities whose answers are known, and published runs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.flow import intervals, paths, solvers
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)
from tests.flow.published import sampling_times, solver_settings, velocity_of

# The published settings of ARFlow.
SDE = {
  "method": "euler",
  "path": paths.LINEAR,
  "diffusion": "sigma",
  "diffusion_norm": 1.0,
  "last_step": "mean",
  "last_step_size": 0.04,
}
SHARES = [10, pytest.param(1, marks=pytest.mark.slow)]  # see `_some`
STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


def _recorded(velocity, states):
  """Notes the x of every call; works without jit only."""

  def record(x, t, carry):
    states.append(np.asarray(x))
    return velocity(x, t, carry)

  return record


def _some(runs, share):
  """All runs on the linear path, and one of so many of the others."""
  others = [run for run in runs if run["path"].lower() != "linear"]
  return [run for run in runs if run not in others] + others[::share]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("path", parity_files("transport_ode*"))
def test_published_ode(path, share, load_parity):
  z = load_parity(path)
  x = channels_last(z["in/z"])
  for run in _some(z.cases(), share):
    name, method = run["name"], run["sampling_method"]
    velocity = velocity_of(z, run)
    times = jnp.asarray(sampling_times(run))
    if method == "dopri5":
      solve = jax.jit(
        functools.partial(
          solvers.adaptive_ode,
          velocity,
          times=times,
          rtol=run["rtol"],
          atol=run["atol"],
        )
      )
      exact = z[f"out/{name}/exact_final"]
      error = relative_error(channels_first(solve(x)), exact)
      assert error < 3 * run["rtol"], name
      continue
    trajectory = z[f"out/{name}/trajectory"]
    states = []
    with jax.disable_jit():
      final, _ = solvers.ode(
        _recorded(velocity, states), x, None, times, method
      )
    assert len(states) == run["model_calls"]
    states = [*states[:: STAGES[method]], final]
    assert len(states) == len(trajectory)
    for state, wanted in zip(states, trajectory):
      assert relative_error(channels_first(state), wanted) < 1e-5, name


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("path", parity_files("transport_sde*"))
def test_published_sde(path, share, load_parity):
  z = load_parity(path)
  x = channels_last(z["in/z"])
  for run in _some(z.cases(), share):
    name = run["name"]
    settings = solver_settings(run)
    times = jnp.asarray(sampling_times(run, settings))
    noise = channels_last(z[f"in/{name}/noise"])
    states = []
    with jax.disable_jit():
      final, _ = solvers.sde(
        _recorded(velocity_of(z, run), states),
        x,
        None,
        times,
        lambda i, noise=noise: noise[i],
        **settings,
      )
    steps = z[f"out/{name}/steps"]
    if settings["method"] == "euler":
      # The x of each call but the first is the state after a step.
      for state, wanted in zip(states[1:], steps):
        assert relative_error(channels_first(state), wanted) < 1e-5, name
    stages = 2 if settings["method"] == "heun" else 1
    last = settings["last_step"] != "none"
    assert len(states) == stages * (run["num_steps"] - 1) + last
    if settings["method"] == "heun":  # its states: step by step
      state = x
      for k in range(len(times) - 1):
        with jax.disable_jit():
          state, _ = solvers.sde(
            velocity_of(z, run),
            state,
            None,
            times[k : k + 2],
            lambda i, drawn=noise[k]: drawn,
            **settings | {"last_step": "none"},
          )
        assert relative_error(channels_first(state), steps[k]) < 1e-5, name
    assert relative_error(channels_first(final), steps[-1]) < 1e-5, name


def _point_mass(mu):
  """Velocity of the linear path to a single point (known answer 1)."""
  return lambda x, t, carry: ((mu - x) / (1 - t), carry + 1)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_reaches_a_point_mass_exactly(steps):
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  mu = jnp.full_like(x, 0.7)
  times = jnp.linspace(0.0, 1.0, steps + 1)
  end, calls = solvers.ode(_point_mass(mu), x, jnp.int32(0), times, "euler")
  np.testing.assert_allclose(end, mu, atol=1e-6)
  assert calls == steps  # the carry went through every call


@pytest.mark.parametrize(
  ("method", "order"),
  [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)],
)
def test_order_of_convergence(method, order):
  """x' = x cos t: the error falls by 2^order when the step is halved."""
  velocity = lambda x, t, carry: (x * jnp.cos(t), carry)
  x = jnp.ones((1, 1, 1, 1))
  errors = []
  for count in (4, 8):
    times = jnp.linspace(0.0, 3.0, count + 1)
    with jax.enable_x64(True):
      end, _ = solvers.ode(
        velocity, x.astype(jnp.float64), None, times.astype(jnp.float64), method
      )
    errors.append(abs(float(end[0, 0, 0, 0]) - np.exp(np.sin(3.0))))
  rate = np.log2(errors[0] / errors[1])
  assert order - 0.6 < rate < order + 1.2


@pytest.mark.parametrize("method", solvers.ODE_METHODS)
def test_there_and_back(method):
  """Mirrored times: t and 1 - t give one trajectory (known answer 5)."""
  x = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
  there = lambda x, t, carry: (jnp.sin(3 * x) + t, carry)
  mirror = lambda x, t, carry: (-there(x, 1 - t, carry)[0], carry)
  times = jnp.linspace(0.0, 1.0, 9)
  a, _ = solvers.ode(there, x, None, times, method)
  b, _ = solvers.ode(mirror, x, None, 1 - times, method)
  np.testing.assert_allclose(a, b, atol=1e-5)
  back, _ = solvers.ode(there, a, None, times[::-1], method)
  limit = {"euler": 0.5, "midpoint": 0.05, "heun2": 0.05}.get(method, 0.005)
  assert np.abs(back - x).max() < limit


def _memory(x, t, carry):
  """Notes in the carry the time of each call that is kept."""
  count, seen = carry
  return 0 * x, (count + 1, seen.at[count].set(t))


@pytest.mark.parametrize("method", solvers.ODE_METHODS)
def test_each_noise_level_enters_the_memory_once_in_an_ode(method):
  times = jnp.linspace(0.0, 1.0, 5)
  start = (jnp.int32(0), jnp.full(8, -1.0))
  _, (count, seen) = solvers.ode(
    _memory, jnp.ones((1, 1, 1, 1)), start, times, method
  )
  assert count == 4
  np.testing.assert_allclose(seen[:4], times[:-1])


@pytest.mark.parametrize("method", solvers.SDE_METHODS)
def test_each_noise_level_enters_the_memory_once_in_an_sde(method):
  times = jnp.linspace(0.0, 0.96, 5)
  start = (jnp.int32(0), jnp.full(8, -1.0))
  x = jnp.ones((1, 1, 1, 1))
  _, (count, seen) = solvers.sde(
    _memory, x, start, times, lambda i: 0 * x, **SDE | {"method": method}
  )
  assert count == 5  # the last step's level too
  np.testing.assert_allclose(seen[:5], times)


def test_later_stages_start_from_the_carry_of_the_first():
  seen = []

  def velocity(x, t, carry):
    seen.append(int(carry))
    return 0 * x, carry + 1

  with jax.disable_jit():
    times = jnp.linspace(0.0, 1.0, 3)
    solvers.ode(velocity, jnp.ones((1, 1, 1, 1)), 0, times, "heun3")
  assert seen == [0, 1, 1, 1, 2, 2]


def test_a_velocity_for_each_step():
  x = jnp.zeros((1, 1, 1, 1))
  slow = lambda x, t, carry: (jnp.ones_like(x), carry + 1)
  fast = lambda x, t, carry: (10 * jnp.ones_like(x), carry + 100)
  times = jnp.linspace(0.0, 1.0, 5)
  end, carry = solvers.ode([slow, fast, fast, slow], x, 0, times, "euler")
  np.testing.assert_allclose(end, 5.5)
  assert carry == 202
  with pytest.raises(ValueError, match="2 velocities for 4 steps"):
    solvers.ode([slow, fast], x, 0, times, "euler")
  for last, steps in (("mean", 5), ("none", 4)):
    settings = SDE | {"last_step": last}
    still, grid = lambda i: x, times[:5] * 0.96
    _, carry = solvers.sde([slow] * steps, x, 0, grid, still, **settings)
    assert carry == steps
    with pytest.raises(ValueError, match=f"6 velocities for {steps} steps"):
      solvers.sde([slow] * 6, x, 0, grid, still, **settings)


def _gaussian(path, mean, std):
  """Exact velocity of data N(mean, std^2) (known answer 2)."""

  def velocity(x, t, carry):
    a, da = path.alpha(t), path.d_alpha(t)
    s, ds = path.sigma(t), path.d_sigma(t)
    variance = a**2 * std**2 + s**2
    slope = (da * a * std**2 + ds * s) / variance
    return da * mean + slope * (x - a * mean), carry

  return velocity


@pytest.mark.parametrize("form", solvers.DIFFUSIONS)
@pytest.mark.parametrize("name", paths.PATHS)
def test_every_diffusion_keeps_the_marginals(name, form):
  mean, std, count, stop = 0.8, 0.5, 20_000, 0.9
  path = paths.PATHS[name]
  start = 0.05 if form == "sbdm" else 0.0
  key = jax.random.key(1)
  x = path.alpha(jnp.float32(start)) * mean + jnp.sqrt(
    path.alpha(jnp.float32(start)) ** 2 * std**2
    + path.sigma(jnp.float32(start)) ** 2
  ) * jax.random.normal(jax.random.key(0), (count, 1, 1, 1))
  noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape)
  times = jnp.linspace(start, stop, 300)
  run = jax.jit(
    lambda x: solvers.sde(
      _gaussian(path, mean, std),
      x,
      None,
      times,
      noise,
      method="heun",
      path=path,
      diffusion=form,
      diffusion_norm=0.7,
      last_step="none",
      last_step_size=0.04,
    )[0]
  )
  end = run(x)
  t = jnp.float32(stop)
  a, s = float(path.alpha(t)), float(path.sigma(t))
  np.testing.assert_allclose(end.mean(), a * mean, atol=0.02)
  np.testing.assert_allclose(end.std(), np.hypot(a * std, s), atol=0.02)


@pytest.mark.parametrize("name", paths.PATHS)
def test_adaptive_ode_carries_a_gaussian_to_its_own(name):
  """Exact map: x1 = mean + std x0 where the path starts from pure noise."""
  path = paths.PATHS[name]
  velocity = _gaussian(path, 0.8, 0.5)
  x = jnp.array([-1.5, 0.0, 2.0])[:, None, None, None]
  low, high = times = jnp.array([0.0, 0.99])
  std = lambda t: jnp.hypot(path.alpha(t) * 0.5, path.sigma(t))
  exact = path.alpha(high) * 0.8 + std(high) / std(low) * (
    x - path.alpha(low) * 0.8
  )
  solve = functools.partial(
    solvers.adaptive_ode, velocity, rtol=1e-5, atol=1e-6
  )
  end = jax.jit(lambda x: solve(x, times))(x)
  np.testing.assert_allclose(end, exact, atol=1e-3)
  back = jax.jit(lambda x: solve(x, times[::-1]))(end)
  np.testing.assert_allclose(back, x, atol=3e-3)


def test_linear_sigma_drift_is_the_published_closed_form():
  seen = []

  def velocity(x, t, carry):
    seen.append((x, t))
    return 0.3 * x + t, carry

  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
  grid = jnp.linspace(0.0, 0.9, 4)
  with jax.disable_jit():
    still = lambda i: jnp.zeros_like(x)
    settings = SDE | {"last_step_size": 0.1}
    final, _ = solvers.sde(velocity, x, None, grid, still, **settings)
  for (a, t), (b, _) in itertools.pairwise(seen):
    v = 0.3 * a + t
    np.testing.assert_allclose(b, a + 0.3 * ((1 + t) * v - a), atol=1e-5)
  a, t = seen[-1]
  wanted = a + 0.1 * ((1 + t) * (0.3 * a + t) - a)
  np.testing.assert_allclose(final, wanted, atol=1e-5)


def test_last_steps_and_their_calls():
  """On the linear path Tweedie is Euler's step to 1, and none makes no call."""
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  velocity = lambda x, t, calls: (0.3 * x + t, calls + 1)
  times = jnp.linspace(0.0, 0.96, 7)
  run = lambda last: solvers.sde(
    velocity, x, 0, times, lambda i: 0.1 * x, **SDE | {"last_step": last}
  )
  ends = {last: run(last) for last in solvers.LAST_STEPS}
  assert {last: int(calls) for last, (_, calls) in ends.items()} == {
    "mean": 7,
    "euler": 7,
    "tweedie": 7,
    "none": 6,
  }
  euler, tweedie = ends["euler"][0], ends["tweedie"][0]
  np.testing.assert_allclose(euler, tweedie, rtol=1e-4, atol=1e-5)
  before = ends["none"][0]
  np.testing.assert_allclose(
    euler, before + 0.04 * (0.3 * before + 0.96), rtol=1e-5, atol=1e-6
  )
  assert np.abs(ends["mean"][0] - euler).max() > 1e-3


def test_unknown_names_are_refused():
  x, times = jnp.ones((1, 1, 1, 1)), jnp.linspace(0.0, 1.0, 3)
  still = lambda x, t, carry: (0 * x, carry)
  with pytest.raises(ConfigError, match="method='rk45'"):
    solvers.ode(still, x, None, times, "rk45")
  with pytest.raises(ValueError, match="two times, got 1"):
    solvers.sde(still, x, None, times[:1], lambda i: x, **SDE)
  for key, name in (
    ("method", "rk4"),
    ("diffusion", "none"),
    ("last_step", "tweedy"),
  ):
    with pytest.raises(ConfigError, match=f"{key}='{name}'"):
      solvers.sde(still, x, None, times, lambda i: x, **SDE | {key: name})


def test_an_adaptive_ode_that_never_ends_says_so():
  x = jnp.ones((1, 1, 1, 1))
  wild = lambda x, t, carry: (x * jnp.cos(1e4 * t), carry)
  with pytest.raises(RuntimeError, match="maximum number of solver steps"):
    solvers.adaptive_ode(
      wild, x, jnp.array([0.0, 1.0]), rtol=1e-3, atol=1e-6, max_steps=16
    )


@pytest.mark.parametrize("method", solvers.SDE_METHODS)
@pytest.mark.parametrize("last", solvers.LAST_STEPS)
@pytest.mark.parametrize("name", paths.PATHS)
def test_every_form_is_finite_over_its_own_interval(name, last, method):
  path = paths.PATHS[name]
  x = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
  for form in solvers.DIFFUSIONS:
    size = 0.0 if last == "none" else 0.04
    low, high = intervals.sampling(path, diffusion=form, last_step_size=size)
    if (method, last, name) == ("heun", "none", "linear"):
      high = 1 - 1e-3  # its last stage would ask for the score at 1
    with jax.disable_jit():
      end, _ = solvers.sde(
        lambda x, t, carry: (0.3 * x, carry),
        x,
        None,
        jnp.linspace(low, high, 3),
        lambda i: x,
        **SDE
        | {
          "method": method,
          "path": path,
          "diffusion": form,
          "last_step": last,
        },
      )
    assert np.isfinite(end).all(), form
