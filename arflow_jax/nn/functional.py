"""NNX modules used functionally: parameters are plain trees, keys arguments."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

Params = dict[str, Any]


class Blueprint:
  """How to build a module, without its parameters.

  Args:
    build: makes the module from a source of initial values.

  Attributes:
    axes: logical axis names of every parameter, shaped like the parameters.
  """

  def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
    self._build = build
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(params=0)))
    self._graphdef, state = nnx.split(abstract, nnx.Param)
    axes = jax.tree.map(
      lambda variable: variable.get_metadata()["axes"],
      state,
      is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    self.axes = nnx.to_pure_dict(axes)

  def init(self, key: Key[Array, ""]) -> Params:
    """Fresh parameters."""
    module = self._build(nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))

  def __call__(self, params: Params) -> nnx.Module:
    """The module with these parameters."""
    return nnx.merge(self._graphdef, nnx.State(params))
