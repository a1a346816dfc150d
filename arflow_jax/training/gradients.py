"""The mean loss of a batch and its gradients, on any mesh.

Each device computes the gradients of its own rows; they are summed in float32
and once a step, whatever the type of the products and however many the
micro-batches: scattered over `fsdp`, then summed over `data`. XLA, left to
itself, sums them in the type of the products, and for each micro-batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from arflow_jax.branches import Branch
from arflow_jax.nn import stack
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.parallel import rows

Batch = dict[str, jax.Array]


def make(
  branch: Branch, mesh: Mesh | AbstractMesh, parts: int
) -> Callable[[Any, Batch, jax.Array], tuple[jax.Array, Any]]:
  """Builds `(params, batch, keys) -> (mean loss, gradients)`.

  A layer's parameters are made whole where that layer uses them, except those
  of modulations (see `layers.Modulation`). With several micro-batches all are
  made whole once a step, and each device adds up whole gradients: memory for
  both, as if `fsdp` were 1.

  Args:
    branch: gives the loss.
    mesh: the devices.
    parts: micro-batches of a step.
  """

  def mean(params, batch, keys):
    return jnp.mean(branch.loss(params, batch, keys))

  def accumulate(params, batch, keys):
    # Micro-batch i takes rows i, i + parts, ... of those that a device holds.
    def deal(x):
      return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def add(total, micro):
      part = jax.value_and_grad(mean)(params, *micro)
      return jax.tree.map(lambda a, b: a + b / parts, total, part), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    micro = (jax.tree.map(deal, batch), deal(keys))
    return jax.lax.scan(add, zeros, micro)[0]

  compute = jax.value_and_grad(mean) if parts == 1 else accumulate
  if mesh_lib.batch_shards(mesh) == 1:
    return compute

  def gather(names, array):
    # Layers of a stack have an axis more: each is made whole when it is used.
    stacked = array.ndim > len(names)
    return array if stacked and parts == 1 else rows.gather(names, array)

  layers = stack.Parts(rows.layer_parameter, rows.layer_product)

  def own(params, batch, keys):
    whole, scatter = jax.vjp(
      lambda params: rows.map_params(gather, branch.axes, params), params
    )
    with stack.in_parts(layers if parts == 1 else None):
      loss, grads = compute(whole, batch, keys)
    grads = rows.map_params(rows.mean, branch.axes, scatter(grads)[0])
    return jax.lax.pmean(loss, rows.ROWS), grads

  return rows.on_own_rows(own, branch.axes, mesh)
