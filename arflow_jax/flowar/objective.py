"""Flow matching on every scale at once (FlowAR, arXiv 2412.15205).

Noise levels run as published, tau = 0 data and tau = 1 noise: the head reads
the integer trunc(1000 tau), which does not survive rounding in 1 - tau, and
answers noise - data, minus the velocity of the rest of this package.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arflow_jax.flow import objective
from arflow_jax.flowar.network import FlowAR, ModelConfig


class Draws(NamedTuple):
  """The random numbers of one training step.

  Attributes:
    levels: tau, one per image and scale, uniform in [0, 1).
    noise: standard normal tokens of all scales, one scale after another.
    dropout: keys for the network, or None to train without dropout.
  """

  levels: Float[Array, "B K"]
  noise: Float[Array, "B L P"]
  dropout: Key[Array, "B"] | None


def integer_levels(levels: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
  """trunc(1000 tau) in float32 arithmetic, as the network was trained on."""
  return jnp.trunc(levels.astype(jnp.float32) * 1000)


def draw(
  keys: Key[Array, "B"], config: ModelConfig, *, dropout: bool = True
) -> Draws:
  """Draws everything, each image's numbers from its own key alone."""
  length = sum(config.pyramid.lengths)

  def item(key):
    level_key, noise_key, dropout_key = jax.random.split(key, 3)
    levels = jax.random.uniform(level_key, (len(config.scales),))
    noise = jax.random.normal(noise_key, (length, config.features))
    return levels, noise, dropout_key

  levels, noise, dropout_keys = jax.vmap(item)(keys)
  return Draws(levels, noise, dropout_keys if dropout else None)


def scale_losses(
  network: FlowAR,
  latents: Float[Array, "B h w C"],
  labels: Int[Array, "B"],
  draws: Draws,
) -> Float[Array, "B K"]:
  """Mean squared error of each scale's velocity, unweighted."""
  pyramid = network.config.pyramid
  targets = pyramid.targets(latents)
  inputs = [
    pyramid.next_input(below, i + 1) for i, below in enumerate(targets[:-1])
  ]
  z, _ = network.conditions(labels, inputs, keys=draws.dropout)
  data = jnp.concatenate([pyramid.tokens(y) for y in targets], axis=1)
  lengths = jnp.array(pyramid.lengths)
  tau = jnp.repeat(
    draws.levels, lengths, axis=1, total_repeat_length=data.shape[1]
  )[..., None]
  x = (1 - tau) * data + tau * draws.noise
  head = network.head
  direction = head(
    x,
    integer_levels(draws.levels),
    head.context(z, pyramid.scales),
    pyramid.scales,
  )
  begins = [sum(pyramid.lengths[:i]) for i in range(len(pyramid.scales) + 1)]
  losses = [
    objective.velocity_loss(direction[:, a:b], (draws.noise - data)[:, a:b])
    for a, b in itertools.pairwise(begins)
  ]
  return jnp.stack(losses, axis=1)


def loss(
  network: FlowAR,
  latents: Float[Array, "B h w C"],
  labels: Int[Array, "B"],
  draws: Draws,
) -> Float[Array, "B"]:
  """Sum over the scales of (s / last s)^2 times their losses."""
  weights = jnp.array(network.config.pyramid.weights)
  return jnp.sum(scale_losses(network, latents, labels, draws) * weights, 1)
