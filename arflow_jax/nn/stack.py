"""Layers of one kind as one module, walked by a loop that compiles them once.

The parameters of a stack have a leading layer axis. What the backward pass of a
layer recomputes is chosen by the name in the config (`model.remat`).
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


class Parts(NamedTuple):
  """How layers compute where a device holds parts of their parameters.

  Attributes:
    parameter: `(names of the axes, parameter of one layer) -> parameter`,
      called inside the loop over the layers: what it makes lives as long as
      one layer takes.
    product: `(function, rows) -> function(rows)`, for a function that holds a
      part of the features it makes; see `layers.Modulation`.
  """

  parameter: Callable[[tuple[str | None, ...], jax.Array], jax.Array]
  product: Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]


_parts: contextvars.ContextVar[Parts | None] = contextvars.ContextVar(
  "parts", default=None
)
parts = _parts.get  # None where layers have their parameters whole


@contextlib.contextmanager
def in_parts(how: Parts | None) -> Iterator[None]:
  """Layers that are traced meanwhile compute in this way."""
  token = _parts.set(how)
  try:
    yield
  finally:
    _parts.reset(token)


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

  how = parts()

  def body(carry, layer):
    params, inputs = layer
    if how:
      params = jax.tree.map(
        lambda p: p.replace(
          how.parameter(p.get_metadata()["axes"], p.get_value())
        ),
        params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
      )
    return step(nnx.merge(graphdef, params), carry, inputs)

  return jax.lax.scan(REMAT[remat](body), carry, (params, inputs))
