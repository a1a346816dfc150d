"""Integrators on velocities whose answers are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.flow import solvers


def _point_mass(mu):
  """Velocity of the linear path to a single point."""
  return lambda x, t, carry: ((mu - x) / (1 - t), carry + 1)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_reaches_a_point_mass_exactly(steps):
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  mu = jnp.full_like(x, 0.7)
  times = jnp.linspace(0.0, 1.0, steps + 1)
  end, calls = solvers.euler(_point_mass(mu), x, jnp.int32(0), times)
  np.testing.assert_allclose(end, mu, atol=1e-6)
  assert calls == steps  # the carry went through every call


def test_sde_calls_the_model_once_per_grid_point():
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  key = jax.random.key(1)
  noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape)
  times = jnp.linspace(0.0, 0.96, 7)
  end, calls = solvers.euler_maruyama(
    _point_mass(jnp.zeros_like(x)), x, jnp.int32(0), times, noise
  )
  assert calls == 7
  assert np.isfinite(end).all()


def test_sde_keeps_the_marginals_of_gaussian_data():
  mean, std, count = 0.8, 0.5, 40_000

  def velocity(x, t, carry):  # spec section 11, known answer 2
    variance = t**2 * std**2 + (1 - t) ** 2
    slope = (t * std**2 - (1 - t)) / variance
    return mean + slope * (x - t * mean), carry

  x = jax.random.normal(jax.random.key(0), (count, 1, 1, 1))
  key = jax.random.key(1)
  noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape)
  times = jnp.linspace(0.0, 0.96, 200)
  for norm in (0.5, 1.0):
    end, _ = jax.jit(
      lambda x, norm=norm: solvers.euler_maruyama(
        velocity, x, None, times, noise, diffusion_norm=norm
      )
    )(x)
    np.testing.assert_allclose(end.mean(), mean, atol=0.02)
    np.testing.assert_allclose(end.std(), std, atol=0.02)


def test_linear_sigma_drift_is_the_published_closed_form():
  seen = []

  def velocity(x, t, carry):
    seen.append((x, t))
    return 0.3 * x + t, carry

  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
  grid = jnp.linspace(0.0, 0.9, 4)
  with jax.disable_jit():
    final, _ = solvers.euler_maruyama(
      velocity, x, None, grid, lambda i: jnp.zeros_like(x), last_step_size=0.1
    )
  for (a, t), (b, _) in itertools.pairwise(seen):
    v = 0.3 * a + t
    np.testing.assert_allclose(b, a + 0.3 * ((1 + t) * v - a), atol=1e-5)
  a, t = seen[-1]
  wanted = a + 0.1 * ((1 + t) * (0.3 * a + t) - a)
  np.testing.assert_allclose(final, wanted, atol=1e-5)


def test_unknown_names_are_refused():
  with pytest.raises(ConfigError, match="diffusion='none'"):
    solvers.check("none", "mean")
  with pytest.raises(ConfigError, match="last_step='tweedy'"):
    solvers.check("sigma", "tweedy")
