"""A trained run ready to draw from: `restore(workdir).generator(...)`."""

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import agreement
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.sampling import images
from arflow_jax.training import checkpoint, state


@dataclasses.dataclass(frozen=True)
class Run:
  """The averaged weights of a run's newest good checkpoint, with its config.

  Attributes:
    config: of the run, with the free keys of its latest launch.
    branch: the model family.
    params: averaged weights, whole on every device of `mesh`.
    step: of the checkpoint.
    mesh: the devices to draw on.
  """

  config: ConfigDict
  branch: branches.Branch
  params: Any
  step: int
  mesh: Mesh

  def settings(self, overrides: dict[str, Any] | None = None) -> ConfigDict:
    """The run's `sample` settings, some of them changed.

    Raises:
      ConfigError: an unknown key, or a value of another type.
    """
    sample = self.config.sample.copy_and_resolve_references().unlock()
    overrides = dict(overrides or {})
    for key in overrides.keys() & sample.keys():
      if isinstance(sample[key], str) and isinstance(overrides[key], tuple):
        # "1,0.5,0" reads as numbers, but this key takes text.
        overrides[key] = ",".join(map(str, overrides[key]))
    config_lib.update(sample, overrides, "sample")
    return sample.lock()

  def generator(
    self, overrides: dict[str, Any] | None = None, seed: int = 0
  ) -> images.Generator:
    """A generator with the run's sample settings, some of them changed.

    Raises:
      ConfigError: an unknown key, a value out of range, or a run whose images
        are not pixels.
    """
    sample = self.settings(overrides)
    return images.Generator(
      self.branch,
      self.params,
      self.branch.settings(sample),
      block_size=sample.block_size,
      seed=seed,
      mesh=self.mesh,
      decode=images.decoder(self.config, self.branch.image_shape),
    )


def restore(workdir: str) -> Run:
  """Restores the averaged weights of a run; training may go on meanwhile.

  Raises:
    ConfigError: no readable checkpoint there.
  """
  agreement.start()
  mesh = drawing_mesh()
  config, params, step = checkpoint.load_weights(
    workdir, lambda stored: state.abstract_params(branches.build(stored), mesh)
  )
  # Another config than the stored one: it has the free keys of later launches.
  return Run(config, branches.build(config), params, step, mesh)


def drawing_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh to draw on, of some devices or of all there are.

  Images share no work: each device draws its own with all the weights.
  """
  return mesh_lib.make_mesh(config_lib.default_config().mesh, devices)


def describe(settings: dict[str, Any]) -> str:
  """Sampling settings as one line, in the form of --set."""
  pairs = (f"{key}={value}" for key, value in settings.items())
  return "sample settings: " + " ".join(pairs)


def parse_overrides(
  assignments: Sequence[str], guidance: float | None = None
) -> dict[str, Any]:
  """`["num_steps=50", "method=ode"]` to typed values.

  Raises:
    ConfigError: text without an equals sign.
  """
  overrides = {}
  for text in assignments:
    key, equals, value = text.partition("=")
    if not equals:
      raise ConfigError(f"--set={text} must look like --set=KEY=VALUE")
    try:
      overrides[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      overrides[key] = value  # a bare word is text
  if guidance is not None:
    overrides["guidance"] = guidance
  return overrides
