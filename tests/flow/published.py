"""The settings of the published runs in our words, and their stand-in model."""

import jax.numpy as jnp
import numpy as np

from arflow_jax.flow import intervals, objective, paths


def path_of(run):
  return paths.PATHS[run["path"].lower()]


def solver_settings(run):
  """Keyword arguments of `solvers.sde`."""
  # One of the published names is misspelt in one of the published programs.
  diffusion = run["diffusion_form"].lower().replace("inccreasing", "increasing")
  return {
    "method": run["sampling_method"].lower(),
    "path": path_of(run),
    "diffusion": diffusion,
    "diffusion_norm": float(run["diffusion_norm"]),
    "last_step": (run["last_step"] or "none").lower(),
    "last_step_size": float(run["last_step_size"]),
  }


def sampling_times(run, settings=None):
  """The grid of a published run, by our own rule for its ends."""
  keywords = {"reverse": run.get("reverse", False)}
  if settings:
    last = settings["last_step"] != "none"
    keywords = {
      "diffusion": settings["diffusion"],
      "last_step_size": settings["last_step_size"] if last else 0.0,
    }
  low, high = intervals.sampling(
    path_of(run), run["prediction"], float(run["sample_eps"]), **keywords
  )
  for ours, name in ((low, "t0"), (high, "t1")):
    assert abs(ours - run.get(name, ours)) < 1e-12, run["name"]
  return np.linspace(low, high, run["num_steps"], dtype=np.float32)


def stand_in(z, prediction):
  """The stand-in network: W x + a t + b over the channels, no carry."""
  name = f"param/{prediction}/"
  w, a, b = (jnp.asarray(z[name + k]) for k in ("W", "a", "b"))

  def model(x, t, carry):
    t = jnp.broadcast_to(t, x.shape[:1])
    mixed = jnp.einsum("bhwj,ij->bhwi", x, w, precision="highest")
    return mixed + a * t[:, None, None, None] + b, carry

  return model


def velocity_of(z, run):
  """The stand-in network of a run as a velocity."""
  model = stand_in(z, run["prediction"])
  return objective.to_velocity(run["prediction"], model, path_of(run))
