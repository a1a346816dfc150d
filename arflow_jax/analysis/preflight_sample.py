"""What drawing images takes on a slice of TPUs: the true sampler, compiled.

One block of images by the config's `sample` settings, on the mesh that the
sampler makes: whole weights on every device, whatever the mesh of training.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax import config as config_lib
from arflow_jax.analysis import estimates, flops, preflight, tpu
from arflow_jax.analysis.chips import Slice
from arflow_jax.data import sources
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.sampling import images, run
from arflow_jax.training import memory, state


def check(place: Slice) -> None:
  """Raises ConfigError where a sampler cannot be compiled."""
  if place.chip is None:
    raise ConfigError(
      f"--what=sample: nothing is compiled for --topology={place.name}, and no"
      " formula tells what a sampler takes; name TPUs, such as v5e:2x2, or"
      " measure on the GPU: python -m arflow_jax.bench --what=sample"
    )


def examine(
  config: ConfigDict, place: Slice, dump: str | os.PathLike
) -> dict[str, Any]:
  """Everything that is found, as it goes into the JSON file.

  Args:
    config: the full config.
    place: what it should fit.
    dump: the folder that `tpu.prepare` was given.

  Raises:
    ConfigError: settings that cannot work.
  """
  config_lib.check(config)
  branch = branches.build(config)
  settings = branch.settings(config.sample)
  channels = branch.image_shape[-1]
  pixels = sources.kind(config).pixels and channels in (1, 3)
  tpu.only_if_needed(*flops.drawing(config, 1))
  mesh = run.drawing_mesh(tpu.devices(place.topology, place.slices))
  rows = images.rows(config.sample.block_size, mesh)
  decode = _latents
  if pixels:
    decode = images.decoder(config, branch.image_shape)
  draw = images.program(branch, settings, mesh, decode)
  split = mesh_lib.batch_sharding(mesh)
  number = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)
  params = state.abstract_params(branch, mesh)
  block = {"indices": number, "labels": number}
  args = (params, block, jax.ShapeDtypeStruct((), jnp.uint32))
  parts = {"parameters": memory.size(params), "block": memory.size(block)}
  found = {
    "topology": place.name,
    "chips": place.chips,
    "slices": place.slices,
    "devices": place.devices,
    "hbm": place.hbm,
    "mesh": dict(mesh.shape),
    "config": config.to_dict(),
    "pixels": pixels,
    "work": {"images": rows, "flops": flops.sample(config, rows)},
  }
  found |= preflight.compiled(mesh, draw, args, parts, place, dump)
  if found["fits"]:
    found["estimate"] = estimates.sample(found, place)
  return found


def _latents(samples: jax.Array) -> jax.Array:
  """In place of a decoder, which this version does not have."""
  return samples
