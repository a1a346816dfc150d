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
  """

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
  if config.branch not in _BRANCHES:
    raise ConfigError(
      f"branch={config.branch!r} is unknown"
      + config_lib.nearest(str(config.branch), list(_BRANCHES))
    )
  module, name = _BRANCHES[config.branch].split(":")
  return getattr(importlib.import_module(module), name)(config)
