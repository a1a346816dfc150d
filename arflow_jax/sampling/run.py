"""A trained run ready to draw from: `restore(workdir).generator(...)`."""

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.parallel import processes
from arflow_jax.sampling import images, writers
from arflow_jax.training import checkpoint


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
        are no pixels.
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
  processes.start()
  # Images share no work: each device draws its own with all the weights.
  mesh = mesh_lib.make_mesh(ConfigDict({"data": -1, "fsdp": 1}))

  def abstract(config: ConfigDict) -> Any:
    branch = branches.build(config)
    shapes = jax.eval_shape(branch.init, jax.random.key(0))
    return mesh_lib.abstract_params(branch.axes, shapes, mesh)

  config, params, step = checkpoint.load_weights(workdir, abstract)
  return Run(config, branches.build(config), params, step, mesh)


def sample_to_file(
  workdir: str,
  out: str,
  *,
  labels: str,
  per_label: int,
  overrides: dict[str, Any],
  seed: int = 0,
  overwrite: bool = False,
) -> None:
  """Draws `per_label` images of each of `labels` (such as "0-9") into `out`.

  Raises:
    ConfigError: an output in the way, unknown labels or settings, no run.
  """
  writers.check_output(out, overwrite)
  classes = images.parse_labels(labels)
  run = restore(workdir)
  images.check_labels(np.array(classes), run.branch.num_classes)
  generator = run.generator(overrides, seed)
  every = np.repeat(classes, per_label)
  print(
    f"drawing {len(every)} images with the weights of step {run.step}",
    flush=True,
  )

  def blocks():
    with tqdm.tqdm(total=len(every), unit="image") as bar:
      for block in generator.blocks(every):
        bar.update(len(block.indices))
        yield block.local()[2]

  names = ["none" if c == run.branch.num_classes else str(c) for c in classes]
  writers.write(out, blocks(), every.tolist(), names, per_label)


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
