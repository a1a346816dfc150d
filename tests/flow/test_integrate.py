"""From a method's name to its solver: grids, calls, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.flow import paths, solvers
from arflow_jax.flow.integrate import METHODS, Integrator

SETTINGS = {
  "method": "sde",
  "diffusion": "sigma",
  "diffusion_norm": 1.0,
  "last_step": "mean",
  "last_step_size": 0.04,
}


def _integrator(**changes):
  return Integrator(**SETTINGS | changes)


def test_every_solver_has_a_name():
  assert METHODS == {
    "sde": ("sde", "euler"),
    "sde-heun": ("sde", "heun"),
    "ode": ("ode", "euler"),
    "ode-midpoint": ("ode", "midpoint"),
    "ode-heun2": ("ode", "heun2"),
    "ode-heun3": ("ode", "heun3"),
    "ode-rk4": ("ode", "rk4"),
  }


@pytest.mark.parametrize(
  ("settings", "path", "prediction", "wanted"),
  [
    ({"method": "ode"}, "linear", "velocity", np.linspace(0, 1, 6)),
    ({"method": "ode"}, "linear", "noise", np.linspace(1e-3, 0.999, 6)),
    ({"method": "ode"}, "vp", "velocity", np.linspace(0, 0.999, 6)),
    ({}, "linear", "velocity", [*np.linspace(0, 0.96, 5), 1]),
    ({"last_step": "none"}, "linear", "velocity", np.linspace(0, 1, 5)),
    ({"last_step": "none"}, "gvp", "score", np.linspace(1e-3, 0.999, 5)),
    (
      {"diffusion": "sbdm", "last_step_size": 0.125},
      "linear",
      "velocity",
      [*np.linspace(1e-3, 0.875, 5), 1],
    ),
  ],
)
def test_times_are_those_of_every_step_and_the_end(
  settings, path, prediction, wanted
):
  times = _integrator(**settings).times(5, paths.PATHS[path], prediction)
  assert times.dtype == np.float32
  np.testing.assert_array_equal(times, np.asarray(wanted, np.float32))


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_reaches_the_solver(method, monkeypatch):
  seen = {}

  def ode(velocities, x, carry, grid, method):
    seen.update(method=method, grid=grid.tolist(), of=velocities)
    return x, carry

  def sde(velocities, x, carry, grid, noise, **keywords):
    seen.update(keywords, grid=grid.tolist(), of=velocities, noise=noise)
    return x, carry

  monkeypatch.setattr(solvers, "ode", ode)
  monkeypatch.setattr(solvers, "sde", sde)
  settings = {
    "diffusion": "sbdm",
    "diffusion_norm": 0.7,
    "last_step": "tweedie",
    "last_step_size": 0.125,
  }
  integrator = _integrator(method=method, **settings)
  velocities, noise = [lambda x, t, carry: (x, carry)] * 3, lambda i: x
  x, times = jnp.zeros((1, 2)), np.array([0, 0.5, 0.875, 1])
  found = integrator(velocities, x, 7, times, noise, paths.GVP)
  assert found[0] is x
  assert found[1] == 7
  equation, name = METHODS[method]
  wanted = {"method": name, "grid": [0, 0.5, 0.875, 1], "of": velocities}
  if equation == "sde":
    wanted |= settings | {"path": paths.GVP, "noise": noise}
    wanted["grid"] = [0, 0.5, 0.875]  # the last step is none of the grid's
  assert seen == wanted


def _integrate(integrator, times):
  """Integrates towards 0.7; the time of each call that enters the carry."""

  def velocity(x, t, carry):
    count, seen = carry
    return (0.7 - x) / (1 - t), (count + 1, seen.at[count].set(t))

  x = jax.random.normal(jax.random.key(0), (2, 3))
  start = (jnp.int32(0), jnp.full(8, -1.0))
  end, (count, seen) = integrator(
    [velocity] * (len(times) - 1),
    x,
    start,
    times,
    lambda i: jnp.zeros_like(x),
    paths.LINEAR,
  )
  return end, seen[:count]


@pytest.mark.parametrize(
  ("method", "last"),
  [
    *(("ode", last) for last in ("mean", "none")),
    *(("sde", last) for last in solvers.LAST_STEPS),
    ("sde-heun", "mean"),
  ],
)
def test_there_is_one_velocity_for_each_time_but_the_end(method, last):
  integrator = _integrator(method=method, last_step=last)
  times = integrator.times(4, paths.LINEAR)
  _, seen = _integrate(integrator, times)
  np.testing.assert_allclose(seen, times[:-1], atol=1e-6)


@pytest.mark.parametrize(
  ("settings", "times"),
  [
    ({"method": "ode"}, 1 - np.array([1, 0.6, 0.3, 0.25, 0])),
    ({"last_step": "tweedie"}, 1 - np.array([1, 0.68, 0.36, 0.04, 0])),
  ],
)
def test_times_of_ones_own(settings, times):
  """Float64 and, for an ODE, uneven; the ends are exact on a point mass."""
  end, seen = _integrate(_integrator(**settings), times)
  np.testing.assert_array_equal(seen, np.float32(times[:-1]))
  np.testing.assert_allclose(end, 0.7, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"method": "heun"}, "sample.method='heun' is unknown"),
    ({"method": "ode-dopri5"}, "sample.method='ode-dopri5'"),
    ({"diffusion": "sgma"}, "sample.diffusion='sgma' is unknown"),
    ({"last_step": "nothing"}, "sample.last_step='nothing' is unknown"),
    ({"last_step_size": 0.0}, "sample.last_step_size=0.0"),
    ({"last_step_size": 1.0}, "sample.last_step_size=1.0"),
    ({"diffusion_norm": 0.0}, "sample.diffusion_norm=0.0"),
    ({"method": "sde-heun", "last_step": "none"}, "sample.last_step='none'"),
  ],
)
def test_bad_settings_are_refused_by_name(change, named):
  with pytest.raises(ConfigError, match=named):
    _integrator(**change)


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_a_single_step_is_refused(method):
  with pytest.raises(ConfigError, match=r"sample\.num_steps=1"):
    _integrator(method=method).times(1, paths.LINEAR)
