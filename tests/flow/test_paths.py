"""Paths against their definitions in float64 and against reference values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.flow import paths, solvers
from arflow_jax.flow.paths import LINEAR
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)
from tests.flow.published import stand_in


@pytest.mark.parametrize("path", parity_files("transport_losses*"))
def test_published_grid(path, load_parity):
  """Every coefficient, diffusion form and conversion on a grid of times."""
  z = load_parity(path)
  t = z["in/grid_t"]
  x, v = channels_last(z["in/grid_x"]), channels_last(z["in/grid_v"])
  wide = paths.expand_times(t, x)
  grid = z.under("out/grid/")

  def predicted(prediction):
    model = stand_in(z, prediction)
    return jnp.concatenate(
      [model(x[i : i + 1], t[i], None)[0] for i in range(len(t))]
    )

  def drift(path, prediction):
    convert = {
      "velocity": lambda v, x, t: v,
      "noise": path.velocity_from_noise,
      "score": path.velocity_from_score,
    }[prediction]
    return convert(predicted(prediction), x, t)

  def score(path, prediction):
    convert = {
      "velocity": path.score_from_velocity,
      "noise": lambda e, x, t: -e / path.sigma(wide),
      "score": lambda s, x, t: s,
    }[prediction]
    return convert(predicted(prediction), x, t)

  values = {
    "alpha": lambda path: path.alpha(t),
    "d_alpha": lambda path: path.d_alpha(t),
    "sigma": lambda path: path.sigma(t),
    "d_sigma": lambda path: path.d_sigma(t),
    "d_alpha_alpha_ratio": lambda path: path.d_alpha_over_alpha(t),
    "drift_var": lambda path: path.score_coefficient(t),
    "drift_mean": lambda path: -path.d_alpha_over_alpha(wide) * x,
    "score_from_velocity": lambda path: path.score_from_velocity(v, x, t),
    "noise_from_velocity": lambda path: path.noise_from_velocity(v, x, t),
    "velocity_from_score": lambda path: path.velocity_from_score(v, x, t),
    "ode_drift": drift,
    "score": score,
  }
  for key, wanted in grid.items():
    name, *prediction, kind = key.split("/")
    path = paths.PATHS[name.lower()]
    if kind.startswith("diffusion_"):
      form = solvers.DIFFUSIONS[kind.removeprefix("diffusion_").lower()]
      ours = form(path, t, grid[f"{name}/diffusion_constant"][0])
    else:
      ours = values[kind](path, *prediction)
    if ours.ndim > 1:
      ours = channels_first(ours)
    assert relative_error(ours, wanted) < 2e-5, key


@pytest.mark.parametrize("name", paths.PATHS)
def test_derivatives_are_those_of_the_coefficients(name):
  path = paths.PATHS[name]
  t = jnp.linspace(0.01, 0.99, 50)
  for f, df in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
    exact = jax.vmap(jax.grad(f))(t)
    np.testing.assert_allclose(df(t), exact, rtol=2e-4, atol=1e-5)
  ratio = path.d_alpha(t) / path.alpha(t)
  np.testing.assert_allclose(path.d_alpha_over_alpha(t), ratio, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "gvp"])
def test_paths_run_from_noise_to_data(name):
  path = paths.PATHS[name]
  key = jax.random.key(0)
  x0 = jax.random.normal(key, (2, 2, 2, 1))
  x1 = x0 + 1
  start, _ = path.interpolate(x0, x1, jnp.zeros(2))
  end, _ = path.interpolate(x0, x1, jnp.ones(2))
  np.testing.assert_allclose(start, x0, atol=1e-6)
  np.testing.assert_allclose(end, x1, atol=1e-6)


@pytest.mark.parametrize("name", paths.PATHS)
def test_score_of_gaussian_data(name):
  """Data N(m, s^2): the velocity's score is -(x - alpha m) / V (spec 11.2)."""
  path, m, s = paths.PATHS[name], 0.4, 0.6
  t = jnp.linspace(0.05, 0.95, 19)
  x = jax.random.normal(jax.random.key(0), (19, 2, 2, 1))
  wide = paths.expand_times(t, x)
  a, da = path.alpha(wide), path.d_alpha(wide)
  b, db = path.sigma(wide), path.d_sigma(wide)
  variance = a**2 * s**2 + b**2
  v = da * m + (da * a * s**2 + db * b) / variance * (x - a * m)
  score = path.score_from_velocity(v, x, t)
  np.testing.assert_allclose(
    score, -(x - a * m) / variance, rtol=2e-3, atol=2e-4
  )


@pytest.mark.parametrize("name", paths.PATHS)
def test_conversions_invert_each_other(name):
  """Known answer 4 of SiT's conversions, and Tweedie against Gaussian data."""
  path, m, s = paths.PATHS[name], 0.4, 0.6
  t = jnp.linspace(0.02, 0.98, 33)
  keys = jax.random.split(jax.random.key(0), 2)
  x, v = (jax.random.normal(key, (33, 2, 2, 1)) for key in keys)
  back = path.velocity_from_score(path.score_from_velocity(v, x, t), x, t)
  np.testing.assert_allclose(back, v, rtol=1e-3, atol=1e-3)
  back = path.velocity_from_noise(path.noise_from_velocity(v, x, t), x, t)
  np.testing.assert_allclose(back, v, rtol=1e-3, atol=1e-3)
  wide = paths.expand_times(t, x)
  a, b = path.alpha(wide), path.sigma(wide)
  variance = a**2 * s**2 + b**2
  expected = m + a * s**2 / variance * (x - a * m)
  score = -(x - a * m) / variance
  np.testing.assert_allclose(
    path.data_from_score(score, x, t), expected, rtol=1e-3, atol=2e-3
  )


def test_linear_tweedie_is_a_step_to_the_end():
  x, v = jnp.ones((3, 1, 1, 1)), jnp.full((3, 1, 1, 1), 0.3)
  t = jnp.array([0.1, 0.5, 0.96])
  data = LINEAR.data_from_score(LINEAR.score_from_velocity(v, x, t), x, t)
  np.testing.assert_allclose(data[:, 0, 0, 0], 1 + (1 - t) * 0.3, rtol=1e-5)
