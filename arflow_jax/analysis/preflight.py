"""Whether a config fits a slice of TPUs or a GPU, and what training costs.

The true train step is compiled and nothing is run: bytes and exchanges are read
from the program, times are estimates by the published peaks of `chips`, and
where nothing can be compiled, or too much, `footprint` is a formula.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax.analysis import collectives, estimates, flops, footprint, tpu
from arflow_jax.analysis.attention_static import compile_counted
from arflow_jax.analysis.benchmark import planned_memory
from arflow_jax.analysis.chips import Slice, slices
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import memory
from arflow_jax.training import program as program_lib

_MARGIN = 0.15  # of the memory that the formula leaves free: it may be wrong
_TRIES = 3  # answers of the formula that are compiled, at most


def examine(
  config: ConfigDict, place: Slice, dump: str | os.PathLike | None
) -> dict[str, Any]:
  """Everything that is found, as it goes into the JSON file.

  Args:
    config: the full config.
    place: what it should fit.
    dump: the folder that `tpu.prepare` was given, where that is a TPU.

  Raises:
    ConfigError: a mesh or a batch that does not divide, and settings that
      cannot work.
  """
  config_lib.check(config)
  mesh = footprint.mesh(
    config, place.devices, place.slices
  )  # the cheapest check first
  on_tpu = place.chip is not None
  formula = footprint.divide(config, place.devices, on_tpu, slices=place.slices)
  found = {
    "topology": place.name,
    "chips": place.chips,
    "slices": place.slices,
    "devices": place.devices,
    "hbm": place.hbm,
    "mesh": dict(mesh.shape),
    "config": config.to_dict(),
    "formula": formula,
    "checkpoint": estimates.checkpoint(config, place),
    "fits": formula["total"] <= (1 - _MARGIN) * place.hbm,
    "work": _work(config),
  }
  factor = 1.0
  if on_tpu:
    rows = config.batch_size // mesh_lib.batch_shards(mesh)
    tpu.only_if_needed(*flops.loss(config, rows))
    program = program_lib.build(config, _devices(place))
    found["form"] = program.form  # raises what cannot work, before compiling
    found |= plan(program, place, dump)
    # The formula is often wrong by the same factor for similar settings.
    total = found["needed"] - formula["total"] + formula["temporaries"]
    factor = max(total, 0) / formula["temporaries"]
    if found["fits"]:
      found["estimate"] = estimates.train(config, found, place)
  if not found["fits"]:
    found["alone"] = _alone(config, place, factor)
    found["remedy"] = _remedy(config, place, factor, dump)
  if on_tpu:
    found["factor"] = factor
    found["smallest"] = _smallest(config, place, factor)
  return found


def _devices(place: Slice) -> list[jax.Device]:
  return tpu.devices(place.topology, place.slices)


def _work(config: ConfigDict) -> dict[str, int]:
  images = config.batch_size * config.data.sequence_length
  return {"images": images, "flops": flops.train_step(config)}


def plan(
  program: program_lib.Program, place: Slice, dump: str | os.PathLike
) -> dict[str, Any]:
  """What the compiler says of a train step, or that it refuses."""
  parts = footprint.state_bytes(program.abstract_state)
  parts["batch"] = memory.size(program.abstract_batch)
  args = (program.abstract_state, program.abstract_batch)
  return compiled(program.mesh, program.step, args, parts, place, dump)


def compiled(
  mesh: Mesh,
  function: Callable,
  args: tuple,
  parts: dict[str, int],
  place: Slice,
  dump: str | os.PathLike,
) -> dict[str, Any]:
  """What the compiler says of a program, or that it refuses.

  Args:
    mesh: the devices of `place`.
    function: jitted.
    args: shapes, types and shardings of its arguments.
    parts: bytes of these on one device, by name.
    place: what it should fit.
    dump: the folder that `tpu.prepare` was given.
  """
  begin = time.monotonic()
  try:
    built, kernels = compile_counted(mesh, function, args, dump, place.chip)
  except jax.errors.JaxRuntimeError as error:
    return {
      "fits": False,
      "needed": _refused(error),
      "compile_time": time.monotonic() - begin,
      "compiler": tpu.version(),
    }
  seconds = time.monotonic() - begin
  given = built.memory_analysis().argument_size_in_bytes
  parts = parts | {"padding": given - sum(parts.values())}
  needed = planned_memory(built)
  parts["temporaries"] = needed - given
  cycles, runs = tpu.estimated_cycles(built)
  sent = collectives.sent(built, mesh, place.slices)
  return {
    "fits": needed <= place.hbm,
    "needed": needed,
    "bytes": parts,
    "compile_time": seconds,
    "compiler": tpu.version(),
    "exchanges": [
      {**exchange._asdict(), "bytes": size, "count": count}
      for exchange, (size, count) in sorted(
        sent.items(), key=lambda item: -item[1][0]
      )
    ],
    "cycles": {
      "xla": cycles,
      "kernels": sum(runs[name] * kernels[name] for name in runs),
    },
  }


def _refused(error: jax.errors.JaxRuntimeError) -> int:
  """Bytes that a program needs which the compiler refuses for them.

  Raises:
    JaxRuntimeError: the same, where it refuses for something else.
  """
  size = re.search(r"\b([\d.]+)([KMGT])\b", str(error).partition("HBM")[2])
  if "RESOURCE_EXHAUSTED" not in str(error) or size is None:
    raise error
  return int(float(size[1]) * 2 ** (10 * (1 + "KMGT".index(size[2]))))


def _alone(
  config: ConfigDict, place: Slice, factor: float
) -> list[dict[str, Any]]:
  """Of each setting, the nearest value that fits alone, by the formula."""
  rows = []
  options = footprint.options(config, place.devices, place.slices)
  for key, values in options.items():
    fitting = (_by_formula(config, place, factor, {key: v}) for v in values)
    rows.append(next(filter(None, fitting), {"change": {key: None}}))
  return rows


def _by_formula(
  config: ConfigDict, place: Slice, factor: float, change: dict[str, Any]
) -> dict[str, Any] | None:
  """A change and the bytes it leads to, or None where they do not fit."""
  changed, tpu = footprint.changed(config, change), place.chip is not None
  try:
    total = footprint.divide(changed, place.devices, tpu, factor, place.slices)[
      "total"
    ]
  except ConfigError:  # a number of shards that the weights cannot have
    return None
  if total > (1 - _MARGIN) * place.hbm:
    return None
  return {"change": change, "formula": total}


def _remedy(
  config: ConfigDict,
  place: Slice,
  factor: float,
  dump: str | os.PathLike | None,
) -> dict[str, Any] | None:
  """The least change with which it fits; on a TPU, one that was compiled."""
  tried = 0
  for change in footprint.changes(config, place.devices, place.slices):
    remedy = _by_formula(config, place, factor, change)
    if remedy is None or place.chip is None:
      if remedy:
        return remedy
      continue
    if (tried := tried + 1) > _TRIES:
      break
    changed = footprint.changed(config, change)
    program = program_lib.build(changed, _devices(place))
    if (answer := plan(program, place, dump))["fits"]:
      worked = {"work": _work(changed)} | answer
      estimate = estimates.train(changed, worked, place)
      return remedy | {"needed": answer["needed"], "estimate": estimate}
  return None


def _smallest(
  config: ConfigDict, place: Slice, factor: float
) -> dict[str, Any] | None:
  """The smallest slice of the generation that fits, by the formula."""
  for other in slices(place.topology.partition(":")[0]):
    try:
      total = footprint.divide(config, other.devices, True, factor)["total"]
    except ConfigError:  # a mesh or batch that it does not divide
      continue
    if total <= (1 - _MARGIN) * other.hbm:
      return {"topology": other.name, "formula": total}
  return None
