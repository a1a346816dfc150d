"""Paths against their definitions in float64 and against reference values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.flow import objective, paths
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)


@pytest.mark.parametrize("path", parity_files("arflow_transport_sequence*"))
def test_sequence_loss(path, load_parity):
  z = load_parity(path)
  x1 = channels_last(z["in/x1"])
  for run in z.meta["runs"]:
    name = run["name"]
    x0 = channels_last(z[f"in/{name}/x0"])
    t = jnp.sort(z[f"in/{name}/uniform"], axis=1)
    assert relative_error(t, z[f"out/{name}/t"]) < 1e-6
    x, v = paths.PATHS[run["path"].lower()].interpolate(x0, x1, t)
    assert relative_error(channels_first(x), z[f"out/{name}/xt"]) < 1e-5
    assert relative_error(channels_first(v), z[f"out/{name}/ut"]) < 1e-5
    w = z["param/W"]
    pred = jnp.einsum("bshwj,ij->bshwi", x, w)
    pred += z["param/a"] * t[..., None, None, None]
    pred += z["param/b"]
    assert relative_error(channels_first(pred), z[f"out/{name}/pred"]) < 1e-5
    loss = objective.velocity_loss(pred, v)
    assert relative_error(loss, z[f"out/{name}/loss"]) < 1e-5


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


def test_sorted_times_ascend_and_cover_the_interval():
  keys = jax.random.split(jax.random.key(0), 500)
  t = jax.vmap(lambda k: objective.sorted_uniform_times(k, 5))(keys)
  assert (np.diff(t, axis=1) >= 0).all()
  np.testing.assert_allclose(t.mean(0), np.arange(1, 6) / 6, atol=0.03)
  assert t.min() >= 0
  assert t.max() < 1
