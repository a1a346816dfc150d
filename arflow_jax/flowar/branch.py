"""FlowAR as the trainer, the sampler and the evaluator see it."""

import functools
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax import values
from arflow_jax.errors import ConfigError
from arflow_jax.flow import guidance
from arflow_jax.flowar import objective, sampler, weights
from arflow_jax.flowar.network import RULES, FlowAR, ModelConfig
from arflow_jax.nn.functional import Blueprint, Params


@functools.lru_cache(maxsize=8)
def _network(model: ModelConfig) -> Blueprint:
  """One for all branches that agree: it takes a while to trace."""
  return Blueprint(lambda rngs: FlowAR(model, rngs=rngs))


class FlowARBranch:
  """See `branches.Branch`."""

  added_keys: ClassVar[dict[str, Any]] = {"model.mlp_ratio": 4.0}
  from_published = staticmethod(weights.from_published)

  def __init__(self, config: ConfigDict):
    model = config.model.to_dict()
    self.label_dropout = model.pop("label_dropout", None)
    values.PROBABILITY("model.label_dropout", self.label_dropout)
    if config.data.sequence_length != 1:
      raise ConfigError(
        f"data.sequence_length={config.data.sequence_length}: FlowAR learns"
        " from single images; set it to 1"
      )
    self.config = model = config_lib.make(ModelConfig, model, "model", RULES)
    self.num_classes = model.num_classes
    self.image_shape = (model.image_size, model.image_size, model.channels)
    self.item_shape = (1, *self.image_shape)
    # Parameters to the network: FlowAR.conditions and FlowAR.head.
    self.network = _network(model)
    self.axes, self.init = self.network.axes, self.network.init

  def draws(
    self, batch: dict[str, jax.Array], keys: Key[Array, "B"]
  ) -> tuple[Int[Array, "B"], objective.Draws]:
    keys = jax.vmap(jax.random.split)(keys)
    drop = lambda key, label: guidance.drop_label(
      key, label, self.num_classes, self.label_dropout
    )
    labels = jax.vmap(drop)(keys[:, 0], batch["labels"])
    dropout = self.config.dropout > 0
    return labels, objective.draw(keys[:, 1], self.config, dropout=dropout)

  def loss(
    self, params: Params, batch: dict[str, jax.Array], keys: Key[Array, "B"]
  ) -> Float[Array, "B"]:
    labels, draws = self.draws(batch, keys)
    network = self.network(params)
    return objective.loss(network, batch["images"][:, 0], labels, draws)

  def form(self, batch_size: int) -> str | None:
    return None  # there is one form of everything

  def settings(self, sample: ConfigDict) -> sampler.Settings:
    settings = sampler.Settings.from_config(sample)
    settings.steps_of(0, len(self.config.scales))  # checks their number
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
