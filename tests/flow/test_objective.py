"""Objectives against the published losses and their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.flow import intervals, objective, paths
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)
from tests.flow.published import path_of, stand_in


@pytest.mark.parametrize("path", parity_files("arflow_transport_sequence*"))
def test_sequence_loss(path, load_parity):
  z = load_parity(path)
  x1 = channels_last(z["in/x1"])
  for run in z.cases():
    name = run["name"]
    x0 = channels_last(z[f"in/{name}/x0"])
    t = jnp.sort(z[f"in/{name}/uniform"], axis=1)
    assert relative_error(t, z[f"out/{name}/t"]) < 1e-6
    x, v = path_of(run).interpolate(x0, x1, t)
    assert relative_error(channels_first(x), z[f"out/{name}/xt"]) < 1e-5
    assert relative_error(channels_first(v), z[f"out/{name}/ut"]) < 1e-5
    w = z["param/W"]
    pred = jnp.einsum("bshwj,ij->bshwi", x, w)
    pred += z["param/a"] * t[..., None, None, None]
    pred += z["param/b"]
    assert relative_error(channels_first(pred), z[f"out/{name}/pred"]) < 1e-5
    loss = objective.velocity_loss(pred, v)
    assert relative_error(loss, z[f"out/{name}/loss"]) < 1e-5


@pytest.mark.parametrize("path", parity_files("transport_losses*"))
def test_losses(path, load_parity):
  z = load_parity(path)
  x1 = channels_last(z["in/x1"])
  for run in z.cases():
    name, prediction = run["name"], run["prediction"]
    path = path_of(run)
    eps = float(run["train_eps"])
    low, high = intervals.training(path, prediction, eps)
    assert (low, high) == pytest.approx((run["t0"], run["t1"]), abs=1e-12)
    t = z[f"in/{name}/uniform"] * (high - low) + low
    assert relative_error(t, z[f"out/{name}/t"]) < 1e-6
    x0 = channels_last(z[f"in/{name}/x0"])
    x, v = path.interpolate(x0, x1, t)
    assert relative_error(channels_first(x), z[f"out/{name}/xt"]) < 1e-5
    assert relative_error(channels_first(v), z[f"out/{name}/ut"]) < 2e-5
    model = stand_in(z, prediction)
    pred = jnp.concatenate(
      [model(x[i : i + 1], t[i], None)[0] for i in range(len(t))]
    )
    assert relative_error(channels_first(pred), z[f"out/{name}/pred"]) < 1e-5
    weight = run["loss_weight"] or "none"
    if prediction == "velocity":
      loss = objective.velocity_loss(pred, v)
    elif prediction == "noise":
      loss = objective.noise_loss(pred, x0, t, path, weight)
    else:
      loss = objective.score_loss(pred, x0, t, path, weight)
    assert relative_error(loss, z[f"out/{name}/loss"]) < 2e-5, name


@pytest.mark.parametrize("weight", objective.WEIGHTS)
@pytest.mark.parametrize("name", paths.PATHS)
def test_noise_and_score_losses_agree(name, weight):
  """With score = -noise / sigma both ask the same (float64 reference too)."""
  path = paths.PATHS[name]
  keys = jax.random.split(jax.random.key(0), 2)
  x0, noise = (jax.random.normal(key, (3, 2, 2, 1)) for key in keys)
  t = jnp.array([0.2, 0.5, 0.8])
  score = -noise / path.sigma(t)[:, None, None, None]
  a = objective.noise_loss(noise, x0, t, path, weight)
  b = objective.score_loss(score, x0, t, path, weight)
  np.testing.assert_allclose(a, b, rtol=1e-5)
  t = np.array([0.2, 0.5, 0.8])
  sigma, b = {
    "linear": (1 - t, (1 - t) / t),
    "gvp": (np.cos(np.pi * t / 2), np.pi / 2 / np.tan(np.pi * t / 2)),
    "vp": (
      np.sqrt(1 - np.exp(-0.5 * (1 - t) ** 2 * 19.9 - (1 - t) * 0.1)),
      0.5 * (0.1 + (1 - t) * 19.9),
    ),
  }[name]
  scale = {
    "none": 1.0,
    "velocity": (b / sigma) ** 2,
    "likelihood": b / sigma**2,
  }
  error = np.asarray(noise, np.float64) - np.asarray(x0)
  wanted = scale[weight] * (error**2).mean((1, 2, 3))
  np.testing.assert_allclose(a, wanted, rtol=1e-4)


def test_unknown_names_are_refused():
  x, t = jnp.ones((1, 1, 1, 1)), jnp.ones(1) / 2
  with pytest.raises(ConfigError, match="weight='sigma'"):
    objective.noise_loss(x, x, t, paths.LINEAR, "sigma")
  with pytest.raises(ConfigError, match="prediction='data'"):
    objective.to_velocity("data", lambda x, t, c: (x, c), paths.LINEAR)


@pytest.mark.parametrize("name", paths.PATHS)
def test_every_prediction_becomes_the_same_velocity_in_one_call(name):
  path = paths.PATHS[name]
  x = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
  t = jnp.float32(0.4)
  lead = jnp.full(2, t)
  v = 0.3 * x + 1
  answers = {
    "velocity": v,
    "noise": path.noise_from_velocity(v, x, lead),
    "score": path.score_from_velocity(v, x, lead),
  }
  for prediction, answer in answers.items():
    model = lambda x, t, calls, answer=answer: (answer, calls + 1)
    velocity = objective.to_velocity(prediction, model, path)
    found, calls = velocity(x, t, 0)
    assert calls == 1
    np.testing.assert_allclose(found, v, rtol=1e-4, atol=1e-5)


def test_sorted_times_ascend_and_cover_the_interval():
  keys = jax.random.split(jax.random.key(0), 500)
  t = jax.vmap(lambda k: objective.sorted_uniform_times(k, 5))(keys)
  assert (np.diff(t, axis=1) >= 0).all()
  np.testing.assert_allclose(t.mean(0), np.arange(1, 6) / 6, atol=0.03)
  assert t.min() >= 0
  assert t.max() < 1


def test_uniform_times_keep_to_their_interval():
  keys = jax.random.split(jax.random.key(0), 2000)
  t = jax.vmap(lambda k: objective.uniform_times(k, (0.2, 0.7)))(keys)
  assert t.min() >= 0.2
  assert t.max() < 0.7
  np.testing.assert_allclose([t.mean(), t.std()], [0.45, 0.144], atol=0.01)
