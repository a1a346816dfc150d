"""Layers of one kind as one module, walked by a loop that compiles them once.

The parameters of a stack have a leading layer axis. What the backward pass of a
layer recomputes is chosen by the name in the config (`model.remat`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

REMAT = {
  # Nothing: every intermediate stays in memory.
  "none": lambda f: f,
  # All but the results of the weight products: little memory, little work.
  "dots": functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  ),
  # Each layer from its input.
  "full": jax.checkpoint,
}


def build(
  layer: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs
) -> nnx.Module:
  """`depth` layers as one module, each drawn from a key of its own.

  Args:
    layer: makes one layer from a source of initial values.
    depth: number of layers, the leading axis of every parameter.
    rngs: source of the initial values of all.
  """

  @nnx.split_rngs(splits=depth)
  @nnx.vmap
  def stacked(rngs):
    return layer(rngs)

  return stacked(rngs)


def walk(
  layers: nnx.Module,
  step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
  carry: Any,
  inputs: Any = None,
  *,
  remat: str = "none",
) -> tuple[Any, Any]:
  """Passes `carry` through the layers, first to last.

  Args:
    layers: what `build` made.
    step: `(layer, carry, input) -> (carry, output)` of one layer.
    carry: what the first layer gets; all pass on the same shapes.
    inputs: a tree of arrays with a leading layer axis, one slice for each
      layer.
    remat: what the backward pass of a layer recomputes, a name in `REMAT`.

  Returns:
    The carry after the last layer, and the outputs of all, stacked.
  """
  graphdef, params = nnx.split(layers)

  def body(carry, layer):
    params, inputs = layer
    return step(nnx.merge(graphdef, params), carry, inputs)

  return jax.lax.scan(REMAT[remat](body), carry, (params, inputs))
