"""The registry of model families, and what each of them offers the services.

A new family is one folder, one config file and one line here.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

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

  def draws(self, batch: dict[str, jax.Array], keys: Key[Array, "B"]) -> Any:
    """All that `loss` draws at random for each item: a tree of `[B, ...]`."""

  def loss(
    self, params: Params, batch: dict[str, jax.Array], keys: Key[Array, "B"]
  ) -> Float[Array, "B"]:
    """Training loss of each item of `batch` (`images`, `labels`)."""

  def form(self, batch_size: int) -> str | None:
    """One line on how it computes a batch on the ambient mesh, if need be.

    Raises:
      ConfigError: settings that cannot work there.
    """

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

  def to_published(self, params: Params) -> dict[str, Float[np.ndarray, "..."]]:
    """The published state dict of these parameters: its names and layouts."""

  @staticmethod
  def from_published(
    state_dict: Mapping[str, Any], **given: Any
  ) -> tuple[dict[str, Any], Params]:
    """The exact inverse of `to_published`, from the arrays alone.

    Args:
      state_dict: arrays (NumPy, or anything NumPy can read) by published name.
      **given: settings of the `model` group that a family cannot tell from
        the shapes of its weights.

    Returns:
      What the weights tell of the config's `model` group, and the parameters: a
      branch built from a config updated with the one has just the shapes of
      the other.

    Raises:
      ConfigError: names that are missing, unexpected or misshapen, all of them,
        or sizes that cannot be told.
    """


def build(config: ConfigDict) -> Branch:
  """The branch that a config asks for.

  Raises:
    ConfigError: an unknown branch, or settings it cannot be built from.
  """
  return family(config.branch)(config)


def family(name: str | None) -> type:
  """The class of a family, a `Branch`, by its name in the config.

  Raises:
    ConfigError: an unknown branch.
  """
  if name not in _BRANCHES:
    raise ConfigError(
      f"branch={name!r} is unknown; choose from {list(_BRANCHES)}"
    )
  module, attribute = _BRANCHES[name].split(":")
  return getattr(importlib.import_module(module), attribute)
