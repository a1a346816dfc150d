"""The networks of the golden values and of the head's reference files."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arflow_jax.flowar import weights
from arflow_jax.flowar.head import FlowHead
from arflow_jax.flowar.network import FlowAR, ModelConfig
from arflow_jax.nn import published
from arflow_jax.nn.functional import Blueprint
from tests.tiny import random_params

SCALES = (1, 2, 4, 8, 16)


def golden_config(cross: bool) -> ModelConfig:
  return ModelConfig(16, 16, 1, SCALES, 128, 2, 2, 2, 192, 2, cross, 1000)


def golden_network(rs: np.random.RandomState, cross: bool) -> FlowAR:
  """The parameter fill of the golden values, in ascending ASCII order."""
  config = golden_config(cross)
  blueprint = Blueprint(lambda rngs: FlowAR(config, rngs=rngs))
  shapes = jax.eval_shape(
    lambda key: published.export(blueprint.init(key), weights._rows(config)),
    jax.random.key(0),
  )
  filled = {}
  for name in sorted(shapes):
    a = rs.standard_normal(shapes[name].shape)
    if name.endswith("pos_embed_learned"):
      a = 0.5 * a
    elif a.ndim >= 2:
      a = a / np.sqrt(np.prod(a.shape[1:]))
    elif name.endswith(".weight"):
      a = 1 + 0.1 * a
    else:
      a = 0.1 * a
    filled[name] = a.astype(np.float32)
  return published_network(filled, num_heads=2)[0]


def published_network(state_dict, **untold) -> tuple[FlowAR, ModelConfig]:
  """The network of published weights, and its config."""
  model, params = weights.from_published(state_dict, **untold)
  config = ModelConfig(**model)
  return Blueprint(lambda rngs: FlowAR(config, rngs=rngs))(params), config


def published_weights(network: FlowAR) -> dict[str, np.ndarray]:
  """The published state dict of a network's parameters."""
  params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
  return weights.to_published(network.config, params)


def random_network(config: ModelConfig) -> FlowAR:
  """A network with random values everywhere."""
  blueprint = Blueprint(lambda rngs: FlowAR(config, rngs=rngs))
  abstract = jax.eval_shape(blueprint.init, jax.random.key(0))
  return blueprint(random_params(abstract))


def head_of(z, network: dict) -> FlowHead:
  """A head alone, from a reference file that holds several."""
  prefix = f"param/n{network['index']}/"
  cross = network["cross"]
  state_dict = {
    name.removeprefix(prefix): z[name]
    for name in z.names
    if name.startswith(prefix) and not name.endswith("freqs")
  }
  blueprint = Blueprint(
    lambda rngs: FlowHead(
      network["in_channels"],
      network["z_channels"],
      network["model_channels"],
      network["num_res_blocks"],
      cross,
      stretch=16.0,
      remat="none",
      dtype=jnp.float32,
      rngs=rngs,
    )
  )
  abstract = jax.eval_shape(blueprint.init, jax.random.key(0))
  rows = weights.head_rows("", "", cross)
  return blueprint(published.restore(state_dict, rows, abstract, {}))
