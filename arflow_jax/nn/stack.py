"""Layers of one kind as one module, walked by a loop that compiles them once.

The parameters of a stack have a leading layer axis. What the backward pass of a
layer recomputes is chosen by the name in the config (`model.remat`).
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from arflow_jax.kernels import kept

_policies = jax.checkpoint_policies
_products = _policies.dots_with_no_batch_dims_saveable


def _keeping(*names: str, products: bool = False) -> Callable:
  policy = _policies.save_only_these_names(*names)
  if products:
    policy = _policies.save_from_both_policies(policy, _products)
  return lambda f: jax.checkpoint(f, policy=policy)


# In the order of the memory that they take.
REMAT = {
  # Nothing: every intermediate stays in memory.
  "none": lambda f: f,
  # All but products with weights and attention: no product is made twice.
  "dots": _keeping(kept.ATTENTION, products=True),
  # All but attention and the result of the feed-forward.
  "attention": _keeping(kept.ATTENTION, kept.FEED_FORWARD),
  # All but that result, the dearest to make again for the memory it takes.
  "feed_forward": _keeping(kept.FEED_FORWARD),
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
  shapes = [p.shape[1:] for p in jax.tree.leaves(params, is_leaf=_is_variable)]

  def body(carry, layer):
    params, inputs = layer
    leaves, tree = jax.tree.flatten(params, is_leaf=_is_variable)
    params = jax.tree.unflatten(tree, map(_whole, leaves, shapes))
    return step(nnx.merge(graphdef, params), carry, inputs)

  flat = jax.tree.map(_flat, params, is_leaf=_is_variable)
  return jax.lax.scan(REMAT[remat](body), carry, (flat, inputs))


def _is_variable(leaf: Any) -> bool:
  return isinstance(leaf, nnx.Variable)


def _flat(parameter: nnx.Variable) -> nnx.Variable:
  """A stacked parameter with a head's features on the axis of the heads.

  Where heads have an axis of their own, XLA for TPUs transposes the weights, so
  as not to pad 64 features to 128, and the tokens too for their gradient.
  """
  value, names = parameter.get_value(), parameter.get_metadata()["axes"]
  shape, heads = list(value.shape), _heads(names)
  if heads is not None:
    heads += value.ndim - len(names)
    shape[heads : heads + 2] = [math.prod(shape[heads : heads + 2])]
  return parameter.replace(value.reshape(shape))


def _whole(parameter: nnx.Variable, shape: tuple[int, ...]) -> nnx.Variable:
  """A layer's parameter as the layer wants it, from a slice of `_flat`'s.

  Args:
    parameter: the slice.
    shape: of the layer's parameter, or of the part that this device holds.
  """
  value, names = parameter.get_value(), parameter.get_metadata()["axes"]
  heads = _heads(names)
  if how := parts():
    flat = names if heads is None else names[: heads + 1] + names[heads + 2 :]
    value = how.parameter(flat, value)
  if heads is not None:
    before, after = value.shape[:heads], value.shape[heads + 1 :]
    value = value.reshape(*before, -1, shape[heads + 1], *after)
  return parameter.replace(value)


def _heads(names: tuple[str | None, ...]) -> int | None:
  """Which axis is that of heads, if that of a head's features comes next."""
  pairs = list(itertools.pairwise(names))
  return pairs.index(("heads", None)) if ("heads", None) in pairs else None
