"""The registry of model families, and what each of them offers the services.

A new family is one folder, one config file and one line here.
"""

import importlib
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError

Params = dict[str, Any]

_BRANCHES = {
  "arflow": "arflow_jax.arflow.branch:ARFlowBranch",
  "flowar": "arflow_jax.flowar.branch:FlowARBranch",
}


@runtime_checkable
class Branch(Protocol):
  """A family of models, built from a config. Parameters are plain pytrees.

  Attributes:
    item_shape: shape of one training item, `[S, h, w, C]`.
    image_shape: shape of one image, `[h, w, C]`.
    num_classes: classes; label `num_classes` stands for none.
    axes: logical axis names of every parameter, shaped like the parameters.
    added_keys: dotted config keys that the family gained after runs were
      stored without them, and the values that those runs had.
  """

  added_keys: dict[str, Any]
  item_shape: tuple[int, ...]
  image_shape: tuple[int, ...]
  num_classes: int
  axes: Params

  def __init__(self, config: ConfigDict): ...

  def init(self, key: Key[Array, ""]) -> Params:
    """Fresh parameters."""

  def loss(
    self, params: Params, batch: dict[str, jax.Array], keys: Key[Array, "B"]
  ) -> Float[Array, "B"]:
    """Training loss of each item of `batch` (`images`, `labels`)."""

  def settings(self, sample: ConfigDict) -> Any:
    """The hashable sampling settings of a `sample` group, checked."""

  def sample(
    self,
    params: Params,
    keys: Key[Array, "B"],
    labels: Int[Array, "B"],
    settings: Any,
  ) -> Float[Array, "B h w C"]:
    """One image per key and label."""


def build(config: ConfigDict) -> Branch:
  """The branch that a config asks for.

  Raises:
    ConfigError: an unknown branch, or settings it cannot be built from.
  """
  return _family(config.branch)(config)


def added_keys(name: str) -> dict[str, Any]:
  """`Branch.added_keys` of a family, by its name.

  Raises:
    ConfigError: an unknown branch.
  """
  return _family(name).added_keys


def _family(name: str) -> type:
  if name not in _BRANCHES:
    hint = config_lib.nearest(str(name), list(_BRANCHES))
    raise ConfigError(f"branch={name!r} is unknown{hint}")
  module, attribute = _BRANCHES[name].split(":")
  return getattr(importlib.import_module(module), attribute)
