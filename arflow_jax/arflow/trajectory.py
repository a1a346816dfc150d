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


def noisy_trajectory(
  images: Float[Array, "B S h w C"],
  labels: Int[Array, "B"],
  keys: Key[Array, "B"],
  *,
  null_label: int,
  label_dropout: float,
  path: paths.Path = paths.LINEAR,
) -> Trajectory:
  """Draws noise levels, noise and label dropout, each from its item's own key.

  Args:
    images: clean images (or latents) of one class per sequence.
    labels: that class.
    keys: one key per sequence.
    null_label: the class that stands for "no class".
    label_dropout: probability that a whole sequence gets `null_label`.
    path: the interpolation path.
  """

  def item(images, label, key):
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    t = objective.sorted_uniform_times(time_key, images.shape[0])
    noise = jax.random.normal(noise_key, images.shape)
    x, velocity = path.interpolate(noise, images, t)
    label = guidance.drop_label(drop_key, label, null_label, label_dropout)
    return Trajectory(x, t, label, velocity)

  return jax.vmap(item)(images, labels, keys)
