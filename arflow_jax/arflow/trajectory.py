"""Noisy image sequences and the loss of ARFlow (arXiv 2501.16085, section 3).

A training item is `S` images of one class, each at a noise level of its own;
the levels ascend along the sequence, as they will along a denoising trajectory.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key

from arflow_jax.flow import guidance, objective, paths


class Trajectory(NamedTuple):
  """What the network sees of a batch, and what it must answer."""

  x: Float[Array, "B S h w C"]
  t: Float[Array, "B S"]
  labels: Int[Array, "B"]
  velocity: Float[Array, "B S h w C"]


class Draws(NamedTuple):
  """The random numbers of one training step."""

  t: Float[Array, "B S"]
  noise: Float[Array, "B S h w C"]
  labels: Int[Array, "B"]  # some of them dropped


def draw(
  labels: Int[Array, "B"],
  keys: Key[Array, "B"],
  shape: tuple[int, int, int, int],
  *,
  null_label: int,
  label_dropout: float,
) -> Draws:
  """Draws noise levels, noise and label dropout, each from its item's own key.

  Args:
    labels: the class of each sequence.
    keys: one key per sequence.
    shape: of a sequence, `[S, h, w, C]`.
    null_label: the class that stands for "no class".
    label_dropout: probability that a whole sequence gets `null_label`.
  """

  def item(label, key):
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    t = objective.sorted_uniform_times(time_key, shape[0])
    noise = jax.random.normal(noise_key, shape)
    label = guidance.drop_label(drop_key, label, null_label, label_dropout)
    return Draws(t, noise, label)

  return jax.vmap(item)(labels, keys)


def noisy_trajectory(
  images: Float[Array, "B S h w C"],
  draws: Draws,
  path: paths.Path = paths.LINEAR,
) -> Trajectory:
  """What the draws make of images.

  Args:
    images: clean images (or latents) of one class per sequence.
    draws: what `draw` returned.
    path: the interpolation path.
  """
  x, velocity = jax.vmap(path.interpolate)(draws.noise, images, draws.t)
  return Trajectory(x, draws.t, draws.labels, velocity)
