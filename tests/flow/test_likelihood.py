"""Likelihood and inversion against closed forms and published runs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.flow import intervals, likelihood, paths, solvers
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)
from tests.flow.published import path_of, stand_in


def _redrawn(velocity, probes):
  """The velocity with divergence, with the next probe in every call."""

  def augmented(state, t, carry):
    field = likelihood.with_divergence(velocity, next(probes))
    return field(state, t, carry)

  return augmented


@pytest.mark.parametrize("path", parity_files("transport_ode*"))
def test_published_likelihoods(path, load_parity):
  z = load_parity(path)
  data = channels_last(z["in/z"])
  every_fifth = jnp.arange(data.size).reshape(data.shape) % 5 == 0
  for run in z.cases("likelihood_runs"):
    name, method = run["name"], run["sampling_method"]
    low, high = intervals.sampling(
      path_of(run), eps=1.0 - run["t1"], reverse=True
    )
    assert (1 - low, 1 - high) == pytest.approx((run["t0"], run["t1"]))
    times = jnp.linspace(low, high, run["num_steps"])
    velocity = stand_in(z, run["model"])
    limit = 3 * run["rtol"] if method == "dopri5" else 1e-5
    if run["model"] == "diag":
      solve = functools.partial(
        likelihood.log_likelihood,
        velocity,
        probe=jnp.where(every_fifth, -1.0, 1.0),
        times=times,
        method=method,
        rtol=run["rtol"],
        atol=run["atol"],
      )
      logp, noise = jax.jit(solve)(data)
    else:
      # The published program redraws the probe at every call: so does the test.
      signs = channels_last(z[f"in/{name}/signs"]).astype(jnp.float32)
      start = (data, jnp.zeros(len(data)))
      with jax.disable_jit():
        (noise, gain), _ = solvers.ode(
          _redrawn(velocity, iter(signs)), start, None, times, method
        )
      logp = likelihood.normal_log_density(noise) + gain
    prior = likelihood.normal_log_density(noise)
    error = relative_error(channels_first(noise), z[f"out/{name}/latent"])
    assert error < limit, name
    assert relative_error(prior, z[f"out/{name}/prior_logp"]) < limit, name
    assert relative_error(logp, z[f"out/{name}/logp"]) < limit, name


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("name", paths.PATHS)
def test_likelihood_of_gaussian_data(name, method):
  """Data N(m, s^2) per pixel has just that density, whatever the probe."""
  path, m, s = paths.PATHS[name], 0.3, 0.6

  def velocity(x, t, carry):
    a, da = path.alpha(t), path.d_alpha(t)
    b, db = path.sigma(t), path.d_sigma(t)
    slope = (da * a * s**2 + db * b) / (a**2 * s**2 + b**2)
    return da * m + slope * (x - a * m), carry

  data = m + s * jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
  probe = jax.random.rademacher(jax.random.key(1), data.shape, jnp.float32)
  low, high = intervals.sampling(path, reverse=True)
  if name == "vp":  # sigma' is infinite at 1, sigma sigma' is not
    low = 1 - 1e-4
  times = jnp.linspace(low, high, 60)
  logp, noise = jax.jit(
    lambda data: likelihood.log_likelihood(
      velocity, data, probe, times, method=method, rtol=1e-5
    )
  )(data)
  density = -0.5 * ((data - m) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)
  near = 2e-3 if name != "vp" else 2e-2  # VP starts from almost pure noise
  np.testing.assert_allclose(logp, density.sum((1, 2, 3)), atol=near)
  # Inversion: the noise is the data standardised, and draws the data again.
  np.testing.assert_allclose(noise, (data - m) / s, atol=near)
  back, _ = solvers.ode(velocity, noise, None, times[::-1], "rk4")
  np.testing.assert_allclose(back, data, atol=2e-3)


def test_divergence_is_unbiased():
  """Mean over all 16 sign probes = the trace of a full 4 x 4 Jacobian."""
  matrix = jax.random.normal(jax.random.key(0), (4, 4))
  velocity = lambda x, t, carry: (
    (x.reshape(1, 4) @ matrix).reshape(x.shape),
    None,
  )
  x = jnp.ones((1, 2, 2, 1))
  total = 0.0
  for signs in itertools.product([-1.0, 1.0], repeat=4):
    probe = jnp.array(signs).reshape(x.shape)
    field = likelihood.with_divergence(velocity, probe)
    (_, divergence), _ = field((x, jnp.zeros(1)), jnp.float32(0), None)
    total += float(divergence[0]) / 16
  np.testing.assert_allclose(total, jnp.trace(matrix), rtol=1e-5)


def test_an_unknown_method_is_refused():
  x = jnp.ones((1, 2, 2, 1))
  still = lambda x, t, carry: (0 * x, carry)
  with pytest.raises(ConfigError, match=r"method='dopri'.*dopri5"):
    likelihood.log_likelihood(
      still, x, x, jnp.array([1.0, 0.0]), method="dopri"
    )
