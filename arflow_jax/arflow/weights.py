"""Published ARFlow weights to our parameters: the map of names and layouts.

The published code keeps a PyTorch state dict: linear weights are (out, in), the
patch embedding is a convolution over (channel, row, column), blocks are counted
in the name, and the fixed position table is stored along.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

# (ours, theirs) inside a block and around the blocks; all are linear layers.
_BLOCK = {
  ("attention", "q_proj"): "attn.q_proj",
  ("attention", "k_proj"): "attn.k_proj",
  ("attention", "v_proj"): "attn.v_proj",
  ("attention", "gate_proj"): "attn.g_proj",
  ("attention", "decay_proj"): "attn.gt_proj",
  ("attention", "out_proj"): "attn.out_proj",
  ("mlp", "fc1"): "mlp.fc1",
  ("mlp", "fc2"): "mlp.fc2",
  ("modulation",): "adaLN_modulation.1",
}
_OUTER = {
  ("time_embedding", "fc1"): "t_embedder.mlp.0",
  ("time_embedding", "fc2"): "t_embedder.mlp.2",
  ("final_modulation",): "final_layer.adaLN_modulation.1",
  ("final_linear",): "final_layer.linear",
}

Params = dict[str, Any]


def params_from_published(
  state_dict: Mapping[str, Float[np.ndarray, "..."]],
) -> Params:
  """Our parameters, float32, from a published state dict.

  Raises:
    KeyError: a weight that the network needs is not there.
  """
  get = lambda name: np.asarray(state_dict[name], np.float32)

  def linear(name: str) -> Params:
    layer = {"kernel": get(name + ".weight").T}
    if name + ".bias" in state_dict:
      layer["bias"] = get(name + ".bias")
    return layer

  params: Params = {}
  for path, name in _OUTER.items():
    _put(params, path, linear(name))
  conv = get("x_embedder.proj.weight")
  params["patch_embedding"] = {
    "kernel": conv.transpose(2, 3, 1, 0).reshape(-1, conv.shape[0]),
    "bias": get("x_embedder.proj.bias"),
  }
  table = get("y_embedder.embedding_table.weight")
  params["label_embedding"] = {"table": table}
  depth = 0
  while f"blocks.{depth}.mlp.fc1.weight" in state_dict:
    depth += 1
  params["blocks"] = {}
  for path, name in _BLOCK.items():
    layers = [linear(f"blocks.{i}.{name}") for i in range(depth)]
    stacked = {k: np.stack([layer[k] for layer in layers]) for k in layers[0]}
    _put(params["blocks"], path, stacked)
  return params


def _put(tree: Params, path: tuple[str, ...], value: Params) -> None:
  for part in path[:-1]:
    tree = tree.setdefault(part, {})
  tree[path[-1]] = value
