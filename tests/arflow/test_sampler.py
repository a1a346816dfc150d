"""Sampling with a carried memory, against golden and reference values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.arflow import sampler
from arflow_jax.errors import ConfigError
from arflow_jax.flow import solvers
from arflow_jax.flow.guidance import Guidance
from tests.arflow.helpers import GOLDEN, golden_state_dict, network, shape_of
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)


def _chain(model, z, labels, noise, guidance, *, num_steps, **kwargs):
  """Runs the published chain; returns the final sample and every call."""
  velocity, state = sampler.guided_velocity(model, labels, guidance)
  calls = []

  def recorded(x, t, state):
    v, state = velocity(x, t, state)
    calls.append((np.asarray(x), float(t), np.asarray(v)))
    return v, state

  batch = labels.shape[0]
  noise = channels_last(noise)[:, :batch]  # only the first half matters
  stop = 1 - kwargs["last_step_size"]
  times = jnp.linspace(0.0, stop, num_steps)
  with jax.disable_jit():
    final, _ = solvers.euler_maruyama(
      recorded, channels_last(z), state, times, lambda i: noise[i], **kwargs
    )
  return final, calls


def test_golden_sample():
  rs = np.random.RandomState(1234)
  model = network(GOLDEN, golden_state_dict(rs))
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
    num_steps=10,
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


def _covered(run) -> bool:
  """Whether the solvers offered so far can make this run."""
  return (
    run["path"] == "Linear"
    and run["prediction"] == "velocity"
    and run["sampling_method"] == "Euler"
    and run["diffusion_form"] in solvers.DIFFUSIONS
    and str(run["last_step"]).lower() in solvers.LAST_STEPS
  )


@pytest.mark.parametrize("path", parity_files("arflow_sde_sample*"))
def test_sde_sample(path, load_parity):
  z = load_parity(path)
  model = network(shape_of(z.meta["constructor"]), z.params())
  runs = [run for run in z.meta["runs"] if _covered(run)]
  assert runs
  for run in runs:
    name = run["name"]
    labels = jnp.asarray(z["in/y"])
    batch = len(labels)
    final, calls = _chain(
      model,
      z["in/z"],
      labels,
      z[f"in/{name}/noise"],
      Guidance(run["cfg_scale"] or 1.0, channels=3),
      num_steps=run["num_steps"],
      diffusion=run["diffusion_form"],
      diffusion_norm=run["diffusion_norm"],
      last_step=run["last_step"].lower(),
      last_step_size=run["last_step_size"],
    )
    outputs = z[f"out/{name}/model_output"]
    steps = z[f"out/{name}/steps"]
    assert len(calls) == len(outputs)
    times = [t for _, t, _ in calls]
    np.testing.assert_allclose(times, z[f"out/{name}/model_times"], atol=1e-6)
    for k, (x, _, v) in enumerate(calls):
      assert relative_error(channels_first(v), outputs[k][:batch]) < 1e-5
      if k:
        wanted = steps[k - 1][:batch]
        assert relative_error(channels_first(x), wanted) < 1e-5
    assert relative_error(channels_first(final), z[f"out/{name}/final"]) < 1e-5


def _model():
  return network(GOLDEN, golden_state_dict(np.random.RandomState(0)))


KEYS = jax.vmap(jax.random.key)(jnp.arange(2))
LABELS = jnp.array([1, 4])


def test_published_defaults_make_250_calls_ending_at_one():
  settings = sampler.Settings()
  times = []
  real = solvers.euler_maruyama

  def record(velocity, x, carry, grid, noise, **kwargs):
    times.append((np.asarray(grid), kwargs))
    return x, carry

  solvers.euler_maruyama = record
  try:
    sampler.sample(_model(), KEYS, LABELS, settings)
  finally:
    solvers.euler_maruyama = real
  grid, kwargs = times[0]
  assert len(grid) == 250
  np.testing.assert_allclose(
    grid[[0, 1, 249]], [0, 0.00385542, 0.96], rtol=1e-5
  )
  assert kwargs["last_step_size"] == 0.04
  assert kwargs["diffusion"] == "sigma"


@pytest.mark.parametrize("method", ["sde", "ode"])
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
    ({"num_steps": 1}, "sample.num_steps=1"),
    ({"last_step_size": 0.0}, "sample.last_step_size=0.0"),
    ({"diffusion_norm": 0.0}, "sample.diffusion_norm=0.0"),
    ({"diffusion": "sgma"}, "diffusion='sgma'"),
    ({"last_step": "none"}, "last_step='none'"),
    ({"guidance": -1.0}, "guidance=-1.0"),
    ({"guidance_low": 0.9, "guidance_high": 0.1}, "guidance interval"),
    ({"guidance_channels": 0}, "guidance_channels=0"),
  ],
)
def test_bad_settings_are_refused_by_name(change, named):
  with pytest.raises(ConfigError, match=named):
    sampler.Settings(**change)
