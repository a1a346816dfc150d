"""Networks from reference files and from the golden parameter fill."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arflow_jax.arflow import weights
from arflow_jax.arflow.network import ARFlow, Shape


def network(shape: Shape, state_dict) -> ARFlow:
  """An ARFlow with published parameters."""
  graphdef, state = nnx.split(
    nnx.eval_shape(lambda: ARFlow(shape, rngs=nnx.Rngs(0))), nnx.Param
  )
  params = weights.params_from_published(state_dict)
  wanted = jax.tree.map(lambda a: a.shape, nnx.to_pure_dict(state))
  assert jax.tree.map(np.shape, params) == wanted
  return nnx.merge(graphdef, nnx.State(jax.tree.map(jnp.asarray, params)))


def shape_of(constructor: dict) -> Shape:
  """The shape that a reference file's constructor arguments describe."""
  return Shape(
    image_size=constructor["input_size"],
    channels=constructor["in_channels"],
    patch_size=constructor["patch_size"],
    width=constructor["hidden_size"],
    depth=constructor["depth"],
    num_heads=constructor["num_heads"],
    num_classes=constructor["num_classes"],
    learn_sigma=constructor["learn_sigma"],
  )


GOLDEN = Shape(
  image_size=8,
  channels=4,
  patch_size=2,
  width=128,
  depth=2,
  num_heads=2,
  num_classes=10,
)


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
