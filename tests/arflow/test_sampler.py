"""Sampling with a carried memory, against golden and reference values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax import branches
from arflow_jax.arflow import sampler
from arflow_jax.errors import ConfigError
from arflow_jax.flow import solvers
from arflow_jax.flow.guidance import Guidance
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


def _chain(model, z, labels, noise, guidance, times, **kwargs):
  """Runs the published chain; returns the final sample and every call."""
  velocities, state = sampler.guided_velocity(model, labels, guidance, times)
  calls = []

  def record(velocity):
    def recorded(x, t, state):
      v, state = velocity(x, t, state)
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
    Guidance(1.5, channels=3),
    np.linspace(0, 0.96, 10, dtype=np.float32),
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
    guidance = Guidance()
    if run["cfg_scale"]:
      guidance = Guidance(run["cfg_scale"], channels=_guided_channels(outputs))
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


def _model():
  return golden_network(np.random.RandomState(0))


KEYS = jax.vmap(jax.random.key)(jnp.arange(2))
LABELS = jnp.array([1, 4])


def test_published_defaults_make_250_calls_ending_at_one(monkeypatch):
  seen = []

  def record(velocity, x, carry, grid, noise, **kwargs):
    seen.append((len(velocity), np.asarray(grid), kwargs))
    return x, carry

  monkeypatch.setattr(solvers, "sde", record)
  sampler.sample(_model(), KEYS, LABELS, sampler.Settings())
  calls, grid, kwargs = seen[0]
  assert calls == len(grid) == 250
  np.testing.assert_allclose(
    grid[[0, 1, 249]], [0, 0.00385542, 0.96], rtol=1e-5
  )
  assert kwargs["last_step_size"] == 0.04
  assert kwargs["diffusion"] == "sigma"


@pytest.mark.parametrize("method", ["sde", "sde-heun", "ode", "ode-rk4"])
def test_an_image_depends_on_its_key_and_label_only(method):
  settings = sampler.Settings(method=method, num_steps=4, guidance=2.0)
  draw = jax.jit(lambda k, y: sampler.sample(_model(), k, y, settings))
  together = draw(KEYS, LABELS)
  alone = draw(KEYS[1:], LABELS[1:])
  np.testing.assert_allclose(together[1:], alone, atol=1e-4)
  assert not np.allclose(together[0], together[1])


def _draw(settings):
  run = jax.jit(lambda k, y: sampler.sample(_model(), k, y, settings))
  return run(KEYS, LABELS)


def test_guidance_one_is_no_guidance():
  plain = sampler.Settings(num_steps=3)
  almost = sampler.Settings(num_steps=3, guidance=1.0 + 1e-6)
  a = _draw(plain)
  b = _draw(almost)
  np.testing.assert_allclose(a, b, atol=1e-3)
  strong = sampler.Settings(num_steps=3, guidance=4.0)
  c = _draw(strong)
  assert np.abs(a - c).max() > 0.1


def test_guidance_outside_every_time_is_no_guidance():
  plain = sampler.Settings(num_steps=4)
  never = sampler.Settings(
    num_steps=4, guidance=4.0, guidance_low=0.97, guidance_high=0.99
  )
  a = _draw(plain)
  b = _draw(never)
  np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"method": "heun"}, "sample.method='heun'"),
    ({"method": "ode-dopri5"}, "sample.method='ode-dopri5'"),
    ({"num_steps": 1}, "sample.num_steps=1"),
    ({"method": "sde-heun", "last_step": "none"}, "sample.last_step='none'"),
    ({"last_step_size": 0.0}, "sample.last_step_size=0.0"),
    ({"diffusion_norm": 0.0}, "sample.diffusion_norm=0.0"),
    ({"diffusion": "sgma"}, "diffusion='sgma'"),
    ({"last_step": "nothing"}, "last_step='nothing'"),
    ({"guidance": -1.0}, "guidance=-1.0"),
    ({"guidance_low": 0.9, "guidance_high": 0.1}, "guidance interval"),
    ({"guidance_channels": 0}, "guidance_channels=0"),
  ],
)
def test_bad_settings_are_refused_by_name(change, named):
  with pytest.raises(ConfigError, match=named):
    sampler.Settings(**change)


@pytest.mark.parametrize("method", sampler.METHODS)
def test_every_setting_reaches_the_solver(method, monkeypatch):
  seen = {}

  def ode(velocity, x, carry, grid, method):
    seen.update(method=method, times=(float(grid[0]), float(grid[-1])))
    return x, carry

  def sde(velocity, x, carry, grid, noise, **kwargs):
    seen.update(kwargs, times=(float(grid[0]), float(grid[-1])))
    return x, carry

  monkeypatch.setattr(solvers, "ode", ode)
  monkeypatch.setattr(solvers, "sde", sde)
  settings = sampler.Settings(
    method=method,
    num_steps=3,
    diffusion="sbdm",
    diffusion_norm=0.7,
    last_step="tweedie",
    last_step_size=0.125,
  )
  sampler.sample(_model(), KEYS, LABELS, settings)
  equation, _, solver = method.partition("-")
  wanted = {"method": solver or "euler", "times": (0.0, 1.0)}
  if equation == "sde":
    wanted |= {
      "diffusion": "sbdm",
      "diffusion_norm": 0.7,
      "last_step": "tweedie",
      "last_step_size": 0.125,
      "times": (pytest.approx(1e-3), 0.875),
    }
  assert seen == wanted


def test_more_guided_channels_than_there_are_is_refused():
  config = get_config("digits").unlock()
  config.sample.guidance_channels = 3
  with pytest.raises(ConfigError, match="guidance_channels=3 exceeds"):
    branches.build(config).settings(config.sample)
