"""ARFlow as the trainer, the sampler and the evaluator see it."""

import functools
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import values
from arflow_jax.arflow import sampler, trajectory, weights
from arflow_jax.arflow.network import RULES, ARFlow, ModelConfig
from arflow_jax.errors import ConfigError
from arflow_jax.flow import objective
from arflow_jax.kernels import hybrid_attention
from arflow_jax.nn.functional import Blueprint, Params


@functools.lru_cache(maxsize=8)
def _network(model: ModelConfig) -> Blueprint:
  """One for all branches that agree: it takes a while to trace."""
  return Blueprint(lambda rngs: ARFlow(model, rngs=rngs))


class ARFlowBranch:
  """See `branches.Branch`."""

  added_keys: ClassVar[dict[str, Any]] = {"model.mlp_ratio": 4.0}
  from_published = staticmethod(weights.from_published)

  def __init__(self, config: ConfigDict):
    model = config.model.to_dict()
    self.label_dropout = model.pop("label_dropout", None)
    values.PROBABILITY("model.label_dropout", self.label_dropout)
    self.config = model = config_lib.make(ModelConfig, model, "model", RULES)
    self.num_classes = model.num_classes
    self.image_shape = (model.image_size, model.image_size, model.channels)
    self.item_shape = (config.data.sequence_length, *self.image_shape)
    # Parameters to the network: ARFlow(x, t, labels, state).
    self.network = _network(model)
    self.axes, self.init = self.network.axes, self.network.init

  def draws(
    self, batch: dict[str, jax.Array], keys: Key[Array, "B"]
  ) -> trajectory.Draws:
    return trajectory.draw(
      batch["labels"],
      keys,
      batch["images"].shape[1:],
      null_label=self.num_classes,
      label_dropout=self.label_dropout,
    )

  def loss(
    self, params: Params, batch: dict[str, jax.Array], keys: Key[Array, "B"]
  ) -> Float[Array, "B"]:
    draws = self.draws(batch, keys)
    noisy = trajectory.noisy_trajectory(batch["images"], draws)
    velocity, _ = self.network(params)(noisy.x, noisy.t, noisy.labels)
    return objective.velocity_loss(velocity, noisy.velocity)

  def form(self, batch_size: int) -> str | None:
    model = self.config
    return hybrid_attention.form(
      batch=batch_size,
      tokens=model.side**2,
      heads=model.num_heads,
      head=model.width // model.num_heads,
      dtype=model.dtype,
      implementation=model.attention,
    )

  def settings(self, sample: ConfigDict) -> sampler.Settings:
    settings = sampler.Settings.from_config(sample)  # checks types
    channels = sample.guidance_channels
    if channels and channels > self.config.channels:
      raise ConfigError(
        f"sample.guidance_channels={channels} exceeds"
        f" model.channels={self.config.channels}"
      )
    return settings

  def sample(
    self,
    params: Params,
    keys: Key[Array, "B"],
    labels: Int[Array, "B"],
    settings: sampler.Settings,
  ) -> Float[Array, "B h w C"]:
    return sampler.sample(self.network(params), keys, labels, settings)

  def to_published(self, params: Params) -> dict[str, Float[np.ndarray, "..."]]:
    return weights.to_published(self.config, params)
