"""Floating-point operations of a program, counted on its jaxpr.

Matrix products and convolutions only (2 per multiply-add), loops multiplied by
their length: XLA's own count takes a loop body once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax.training import state


def count(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of one call of `function`; `args` may be `ShapeDtypeStruct`s.

  Raises:
    ValueError: a `while` loop, whose length the program does not tell, a `cond`
      whose branches cost differently, or a Pallas kernel that declares nothing.
  """
  return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def train_step(config: ConfigDict) -> int:
  """Model FLOPs of a train step: 3x the forward pass of the loss.

  What remat computes twice counts once.
  """
  return 3 * count(*loss(config, config.batch_size))


def sample(config: ConfigDict, rows: int) -> int:
  """Model FLOPs of drawing so many images by the config's sample settings."""
  return count(*drawing(config, rows))


def loss(config: ConfigDict, rows: int) -> tuple[Any, ...]:
  """The loss of so many items, and the shapes of its arguments."""
  branch = branches.build(config)
  params = jax.eval_shape(branch.init, jax.random.key(0))
  keys = jax.eval_shape(lambda: state.item_keys(0, jnp.int32(0), rows))
  batch = {
    "images": jax.ShapeDtypeStruct((rows, *branch.item_shape), jnp.float32),
    "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
  }
  return branch.loss, params, batch, keys


def drawing(config: ConfigDict, rows: int) -> tuple[Any, ...]:
  """The sampler of so many images, and the shapes of its arguments."""
  branch = branches.build(config)
  draw = functools.partial(
    branch.sample, settings=branch.settings(config.sample)
  )
  params = jax.eval_shape(branch.init, jax.random.key(0))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  return draw, params, keys, jax.ShapeDtypeStruct((rows,), jnp.int32)


def _jaxpr(jaxpr) -> int:
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return (
      2
      * equation.outvars[0].aval.size
      * math.prod(shape[axis] for axis in contracted)
    )
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval
    outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return 2 * equation.outvars[0].aval.size * kernel.size // outputs
  if name == "pallas_call":
    # A kernel's own products tell nothing: it may compute some of them twice.
    if (cost := params["cost_estimate"]) is None:
      raise ValueError("cannot count a Pallas kernel without a cost_estimate")
    return cost.flops
  if name == "cond":
    costs = {_jaxpr(branch.jaxpr) for branch in params["branches"]}
    if len(costs) > 1:
      raise ValueError(f"cannot count a cond: its branches cost {costs}")
    return costs.pop()
  inner = [_jaxpr(sub) for sub in _inner(params)]
  if name == "while" and any(inner):
    raise ValueError("cannot count a while loop: its length is not known")
  return sum(inner) * _times(name, params)


def _times(name: str, params) -> int:
  if name == "scan":
    return params["length"]
  if name == "shard_map":  # what is inside is one device's share
    sizes = params["mesh"].shape
    return math.prod(sizes[axis] for axis in params["newly_manual_axes"])
  return 1


def _inner(params):
  for value in params.values():
    value = getattr(value, "jaxpr", value)  # closed jaxprs hold an open one
    if hasattr(value, "eqns"):
      yield value
