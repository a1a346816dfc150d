"""The parameter fill of the golden values, and the network it makes."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from arflow_jax.arflow import weights
from arflow_jax.arflow.network import ARFlow, ModelConfig
from arflow_jax.nn.functional import Blueprint
from tests.tiny import random_params

GOLDEN = ModelConfig(
  image_size=8,
  channels=4,
  patch_size=2,
  width=128,
  depth=2,
  num_heads=2,
  num_classes=10,
)


def golden_network(rs: np.random.RandomState) -> ARFlow:
  """The network of the golden values, for 8x8 latents."""
  return published_network(golden_state_dict(rs), image_size=8)[0]


def published_network(state_dict, **untold) -> tuple[ARFlow, ModelConfig]:
  """The network of published weights, and its config."""
  model, params = weights.from_published(state_dict, **untold)
  config = ModelConfig(**model)
  return Blueprint(lambda rngs: ARFlow(config, rngs=rngs))(params), config


def published_weights(network: ARFlow) -> dict[str, np.ndarray]:
  """The published state dict of a network's parameters."""
  params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
  return weights.to_published(network.config, params)


def random_network(config: ModelConfig) -> ARFlow:
  """A network whose zero-initialised layers are random too."""
  blueprint = Blueprint(lambda rngs: ARFlow(config, rngs=rngs))
  abstract = jax.eval_shape(blueprint.init, jax.random.key(0))
  return blueprint(random_params(abstract, 0.1))


def with_attention(model: ARFlow, implementation: str | None) -> ARFlow:
  """The same parameters with another implementation of the attention."""
  config = dataclasses.replace(model.config, attention=implementation)
  blueprint = Blueprint(lambda rngs: ARFlow(config, rngs=rngs))
  return blueprint(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def golden_state_dict(rs: np.random.RandomState) -> dict[str, np.ndarray]:
  """The parameter fill of the golden values, in ascending ASCII order."""
  width, heads, channels, patch = 128, 2, 4, 2
  shapes = {
    "x_embedder.proj.weight": (width, channels, patch, patch),
    "x_embedder.proj.bias": (width,),
    "t_embedder.mlp.0.weight": (width, 256),
    "t_embedder.mlp.0.bias": (width,),
    "t_embedder.mlp.2.weight": (width, width),
    "t_embedder.mlp.2.bias": (width,),
    "y_embedder.embedding_table.weight": (11, width),
    "final_layer.linear.weight": (8 * patch**2, width),
    "final_layer.linear.bias": (8 * patch**2,),
    "final_layer.adaLN_modulation.1.weight": (2 * width, width),
    "final_layer.adaLN_modulation.1.bias": (2 * width,),
  }
  for i in range(2):
    block = f"blocks.{i}."
    for name in ("q_proj", "k_proj", "v_proj", "g_proj", "out_proj"):
      shapes[f"{block}attn.{name}.weight"] = (width, width)
    shapes[block + "attn.gt_proj.weight"] = (heads, width)
    shapes[block + "mlp.fc1.weight"] = (4 * width, width)
    shapes[block + "mlp.fc1.bias"] = (4 * width,)
    shapes[block + "mlp.fc2.weight"] = (width, 4 * width)
    shapes[block + "mlp.fc2.bias"] = (width,)
    shapes[block + "adaLN_modulation.1.weight"] = (6 * width, width)
    shapes[block + "adaLN_modulation.1.bias"] = (6 * width,)
  filled = {}
  for name in sorted(shapes):
    a = rs.standard_normal(shapes[name])
    a = a / np.sqrt(np.prod(a.shape[1:])) if a.ndim >= 2 else a * 0.1
    filled[name] = a.astype(np.float32)
  return filled
