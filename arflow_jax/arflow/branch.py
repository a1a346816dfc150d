"""ARFlow as the trainer, the sampler and the evaluator see it."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from arflow_jax.arflow import sampler, trajectory
from arflow_jax.arflow.network import ARFlow, Shape
from arflow_jax.errors import ConfigError
from arflow_jax.flow import objective

Params = dict


class ARFlowBranch:
  """See `branches.Branch`."""

  def __init__(self, config: ConfigDict):
    model = config.model.to_dict()
    self.label_dropout = model.pop("label_dropout")
    if not 0 <= self.label_dropout < 1:
      raise ConfigError(
        f"model.label_dropout={self.label_dropout} must lie in [0, 1)"
      )
    self.shape = Shape(**model)
    self.num_classes = self.shape.num_classes
    side = self.shape.image_size
    self.image_shape = (side, side, self.shape.channels)
    self.item_shape = (config.data.sequence_length, *self.image_shape)
    abstract = nnx.eval_shape(lambda: self._build(jax.random.key(0)))
    self._graphdef, state = nnx.split(abstract, nnx.Param)
    axes = jax.tree.map(
      lambda variable: variable.get_metadata()["axes"],
      state,
      is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    self.axes = nnx.to_pure_dict(axes)

  def _build(self, key: Key[Array, ""]) -> ARFlow:
    return ARFlow(self.shape, rngs=nnx.Rngs(params=key))

  def network(self, params: Params) -> ARFlow:
    """The network with these parameters."""
    return nnx.merge(self._graphdef, nnx.State(params))

  def init(self, key: Key[Array, ""]) -> Params:
    return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

  def loss(
    self, params: Params, batch: dict[str, jax.Array], keys: Key[Array, "B"]
  ) -> Float[Array, "B"]:
    noisy = trajectory.noisy_trajectory(
      batch["images"],
      batch["labels"],
      keys,
      null_label=self.num_classes,
      label_dropout=self.label_dropout,
    )
    velocity, _ = self.network(params)(noisy.x, noisy.t, noisy.labels)
    return objective.velocity_loss(velocity, noisy.velocity)

  def settings(self, sample: ConfigDict) -> sampler.Settings:
    settings = sample.to_dict()
    del settings["block_size"]  # the service's, not the model's
    return sampler.Settings(**settings)

  def sample(
    self,
    params: Params,
    keys: Key[Array, "B"],
    labels: Int[Array, "B"],
    settings: sampler.Settings,
  ) -> Float[Array, "B h w C"]:
    return sampler.sample(self.network(params), keys, labels, settings)
