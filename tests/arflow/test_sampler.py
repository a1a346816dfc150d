"""Sampling with a carried memory, against golden and reference values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax import branches
from arflow_jax.arflow import sampler
from arflow_jax.errors import ConfigError
from arflow_jax.flow import paths, solvers
from arflow_jax.flow.guidance import Guidance
from arflow_jax.flow.integrate import Integrator
from configs.arflow import get_config
from tests.arflow.helpers import (
  golden_network,
  published_network,
  with_attention,
)
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)
from tests.flow.published import sampling_times, solver_settings


def _settings(**changes):
  """The published settings without guidance, some of them changed."""
  sample = get_config("imagenet256-xl2").sample
  sample.update({"guidance": 1.0} | changes)
  return sampler.Settings.from_config(sample)


def _chain(model, z, labels, noise, guidance, times, **kwargs):
  """Runs the published chain; returns the final sample and every call."""
  starts = times[:-1] if kwargs["last_step"] == "none" else times
  velocities, state = sampler.guided_velocity(model, labels, guidance, starts)
  calls = []

  @functools.cache  # the velocities of a run are one or two objects
  def record(velocity):
    compiled = jax.jit(velocity)

    def recorded(x, t, state):
      with jax.disable_jit(False):
        v, state = compiled(x, t, state)
      calls.append((np.asarray(x), float(t), np.asarray(v)))
      return v, state

    return recorded

  batch = labels.shape[0]
  noise = channels_last(noise)[:, :batch]  # only the first half matters
  with jax.disable_jit():
    final, _ = solvers.sde(
      [record(velocity) for velocity in velocities],
      channels_last(z),
      state,
      jnp.asarray(times),
      lambda i: noise[i],
      **kwargs,
    )
  return final, calls


@pytest.mark.parametrize("attention", [None, "pallas_tpu_interpret"])
def test_golden_sample(attention):
  rs = np.random.RandomState(1234)
  model = with_attention(golden_network(rs), attention)
  rs.standard_normal((2, 5, 4, 8, 8))
  rs.uniform(size=(2, 5))
  z = rs.standard_normal((2, 4, 8, 8)).astype(np.float32)
  noise = rs.standard_normal((9, 4, 4, 8, 8)).astype(np.float32)
  final, calls = _chain(
    model,
    z,
    jnp.array([3, 7]),
    noise,
    Guidance(1.5, (0.0, 1.0), 3),
    np.linspace(0, 0.96, 10, dtype=np.float32),
    method="euler",
    path=paths.LINEAR,
    diffusion="sigma",
    diffusion_norm=1.0,
    last_step="mean",
    last_step_size=0.04,
  )
  assert len(calls) == 10
  final = channels_first(final)
  first = [0.14599, -0.89245, 1.86091, -0.14364]
  first += [-0.25548, 1.08412, 0.37332, -0.21633]
  last = [0.33532, 1.86201, -0.78429, 0.57428]
  last += [0.01779, 0.31412, 0.91162, 2.04027]
  np.testing.assert_allclose(final[0, 0, 0], first, atol=1e-4)
  np.testing.assert_allclose(final[1, 3, 7], last, atol=1e-4)
  np.testing.assert_allclose(final.mean(), 0.08715, atol=1e-4)
  np.testing.assert_allclose(final.std(), 1.13705, atol=1e-4)


def _guided_channels(outputs):
  """How many channels a run guided: they are alike in both halves."""
  halves = np.split(outputs, 2, axis=1)
  alike = np.isclose(*halves, atol=1e-5).all(axis=(0, 1, -2, -1))
  return int(alike.sum())


@pytest.mark.parametrize("path", parity_files("arflow_sde_sample*"))
def test_sde_sample(path, load_parity):
  z = load_parity(path)
  model, _ = published_network(z.params())
  for run in z.cases():
    name = run["name"]
    labels = jnp.asarray(z["in/y"])
    batch = len(labels)
    settings = solver_settings(run)
    times = sampling_times(run, settings)
    outputs = z[f"out/{name}/model_output"]
    channels = _guided_channels(outputs) if run["cfg_scale"] else None
    guidance = Guidance(float(run["cfg_scale"] or 1), (0.0, 1.0), channels)
    final, calls = _chain(
      model,
      z["in/z"],
      labels,
      z[f"in/{name}/noise"],
      guidance,
      times,
      **settings,
    )
    limit = 2e-5 if settings["diffusion"] == "sbdm" else 1e-5
    steps = z[f"out/{name}/steps"]
    assert len(calls) == len(outputs)
    times = [t for _, t, _ in calls]
    np.testing.assert_allclose(times, z[f"out/{name}/model_times"], atol=1e-6)
    for k, (x, _, v) in enumerate(calls):
      assert relative_error(channels_first(v), outputs[k][:batch]) < limit
      if k:
        wanted = steps[k - 1][:batch]
        assert relative_error(channels_first(x), wanted) < limit
    assert relative_error(channels_first(final), z[f"out/{name}/final"]) < limit


@functools.cache
def _model():
  return golden_network(np.random.RandomState(0))


KEYS = jax.vmap(jax.random.key)(jnp.arange(2))
LABELS = jnp.array([1, 4])


def test_published_defaults_make_250_calls_ending_at_one(monkeypatch):
  def sde(velocity, x, carry, grid, noise, **kwargs):
    assert len(velocity) == len(grid) == 250
    np.testing.assert_allclose(
      grid[jnp.array([0, 1, 249])], [0, 0.00385542, 0.96], rtol=1e-5
    )
    assert kwargs["last_step_size"] == 0.04
    assert kwargs["diffusion"] == "sigma"
    draws = np.stack([x, noise(0), noise(1)])
    assert len(np.unique(draws)) == draws.size  # no draw is used twice
    return x, carry

  monkeypatch.setattr(solvers, "sde", sde)
  sampler.sample(_model(), KEYS, LABELS, _settings())


@functools.cache
def _program(**changes):
  # The model is made here: one made inside the program would hold its tracers.
  model, settings = _model(), _settings(num_steps=3, **changes)
  return jax.jit(lambda k, y: sampler.sample(model, k, y, settings))


def _draw(keys=KEYS, labels=LABELS, **changes):
  return _program(**changes)(keys, labels)


@pytest.mark.parametrize("method", ["sde", "sde-heun", "ode", "ode-rk4"])
def test_an_image_depends_on_its_key_and_label_only(method):
  settings = {"method": method, "guidance": 4.0}
  found = _draw(**settings)
  others = jax.vmap(jax.random.key)(jnp.array([1, 7]))
  moved = _draw(others, jnp.array([4, 9]), **settings)
  np.testing.assert_allclose(found[1], moved[0], atol=1e-4)
  assert not np.allclose(found[0], moved[1])
  assert not np.allclose(found, _draw(keys=others, **settings))
  assert not np.allclose(found, _draw(labels=jnp.array([4, 1]), **settings))


def test_guidance_one_is_no_guidance():
  plain = _draw(method="sde", guidance=1.0)
  almost = _draw(method="sde", guidance=1.0 + 1e-6)
  np.testing.assert_allclose(plain, almost, atol=1e-3)
  strong = _draw(method="sde", guidance=4.0)
  assert np.abs(plain - strong).max() > 0.1


def test_guidance_outside_every_time_is_no_guidance():
  plain = _draw(method="sde", guidance=1.0)
  never = _draw(guidance=4.0, guidance_low=0.97, guidance_high=0.99)
  np.testing.assert_allclose(plain, never, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"method": "heun"}, "sample.method='heun'"),
    ({"num_steps": 1}, "sample.num_steps=1"),
    ({"guidance": -1.0}, "sample.guidance=-1.0"),
    ({"guidance_low": 0.9, "guidance_high": 0.1}, "sample.guidance_low=0.9"),
    ({"guidance_channels": 0}, "sample.guidance_channels=0"),
  ],
)
def test_bad_settings_are_refused_by_name(change, named):
  with pytest.raises(ConfigError, match=named):
    _settings(**change)


def test_every_key_of_the_config_has_its_place():
  integrator = {
    "method": "ode-rk4",
    "diffusion": "sbdm",
    "diffusion_norm": 0.7,
    "last_step": "tweedie",
    "last_step_size": 0.125,
  }
  settings = _settings(
    num_steps=3,
    guidance=2.0,
    guidance_low=0.1,
    guidance_high=0.9,
    guidance_channels=1,
    **integrator,
  )
  assert settings == sampler.Settings(
    3, Integrator(**integrator), Guidance(2.0, (0.1, 0.9), 1)
  )


def test_more_guided_channels_than_there_are_is_refused():
  config = get_config("digits").unlock()
  config.sample.guidance_channels = 3
  with pytest.raises(ConfigError, match="guidance_channels=3 exceeds"):
    branches.build(config).settings(config.sample)
