"""Whether a config fits a slice of TPUs or a GPU, and what training costs.

The true train step is compiled and nothing is run: bytes and exchanges are read
from the program, times are estimates by the published peaks of `chips`, and
where nothing can be compiled, or too much, `footprint` is a formula.
"""

import os
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from arflow_jax import config as config_lib
from arflow_jax.analysis import collectives, flops, footprint, tpu
from arflow_jax.analysis.attention_static import compile_step
from arflow_jax.analysis.benchmark import planned_memory
from arflow_jax.analysis.chips import Slice, slices
from arflow_jax.errors import ConfigError
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
  mesh = footprint.mesh(config, place.devices)  # the cheapest check first
  on_tpu = place.chip is not None
  formula = footprint.divide(config, place.devices, on_tpu)
  found = {
    "topology": place.name,
    "chips": place.chips,
    "devices": place.devices,
    "hbm": place.hbm,
    "mesh": dict(mesh.shape),
    "config": config.to_dict(),
    "formula": formula,
    "checkpoint": footprint.checkpoint(config),
    "fits": formula["total"] <= (1 - _MARGIN) * place.hbm,
    "work": _work(config),
  }
  factor = 1.0
  if on_tpu:
    program = program_lib.build(config, tpu.devices(place.name))
    found["form"] = program.form  # raises what cannot work, before compiling
    found |= plan(program, place, dump)
    # The formula is often wrong by the same factor for similar settings.
    total = found["needed"] - formula["total"] + formula["temporaries"]
    factor = max(total, 0) / formula["temporaries"]
    if found["fits"]:
      found["estimate"] = _estimate(config, found, place)
  if not found["fits"]:
    found["alone"] = _alone(config, place, factor)
    found["remedy"] = _remedy(config, place, factor, dump)
  if on_tpu:
    found["factor"] = factor
    found["smallest"] = _smallest(config, place, factor)
  return found


def _work(config: ConfigDict) -> dict[str, int]:
  images = config.batch_size * config.data.sequence_length
  return {"images": images, "flops": flops.train_step(config)}


def plan(
  program: program_lib.Program, place: Slice, dump: str | os.PathLike
) -> dict[str, Any]:
  """What the compiler says, or that it refuses."""
  begin = time.monotonic()
  try:
    compiled, kernels = compile_step(program, dump, place.chip)
  except jax.errors.JaxRuntimeError as error:
    return {
      "fits": False,
      "needed": _refused(error),
      "compile_time": time.monotonic() - begin,
      "compiler": tpu.version(),
    }
  seconds = time.monotonic() - begin
  given = compiled.memory_analysis().argument_size_in_bytes
  parts = footprint.state_bytes(program.abstract_state)
  parts["batch"] = memory.size(program.abstract_batch)
  parts["padding"] = given - sum(parts.values())
  needed = planned_memory(compiled)
  parts["temporaries"] = needed - given
  cycles, runs = tpu.estimated_cycles(compiled)
  sent = collectives.sent(compiled, program.mesh)
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


def _estimate(
  config: ConfigDict, found: dict[str, Any], place: Slice
) -> dict[str, Any]:
  """What published peaks make of a step: seconds, and what follows of them."""
  chip, work = place.chip, found["work"]
  sent = sum(row["bytes"] for row in found["exchanges"])
  parts = {
    "products": work["flops"] / place.chips / chip.peak,
    # State and temporaries are read and written at least once.
    "memory": 2 * found["needed"] * chip.devices / chip.hbm_rate,
    # Half of the published rate is what a chip can send.
    "exchange": sent * chip.devices / (chip.links / 2),
    "cycles": sum(found["cycles"].values()) / chip.clock,
  }
  compute = max(parts["products"], parts["memory"], parts["cycles"])
  steps = {
    "hidden": max(compute, parts["exchange"]),
    "in_turn": compute + parts["exchange"],
  }
  return {
    "parts": parts,
    "steps": {
      name: {
        "seconds": seconds,
        "mfu": parts["products"] / seconds,
        "images_per_second": work["images"] / seconds,
        "days": config.steps * seconds / 86_400,
        "chip_hours": config.steps * seconds * place.chips / 3600,
      }
      for name, seconds in steps.items()
    },
  }


def _alone(
  config: ConfigDict, place: Slice, factor: float
) -> list[dict[str, Any]]:
  """Of each setting, the nearest value that fits alone, by the formula."""
  rows = []
  for key, values in footprint.options(config, place.devices).items():
    fitting = (_by_formula(config, place, factor, {key: v}) for v in values)
    rows.append(next(filter(None, fitting), {"change": {key: None}}))
  return rows


def _by_formula(
  config: ConfigDict, place: Slice, factor: float, change: dict[str, Any]
) -> dict[str, Any] | None:
  """A change and the bytes it leads to, or None where they do not fit."""
  changed, tpu = footprint.changed(config, change), place.chip is not None
  try:
    total = footprint.divide(changed, place.devices, tpu, factor)["total"]
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
  for change in footprint.changes(config, place.devices):
    remedy = _by_formula(config, place, factor, change)
    if remedy is None or place.chip is None:
      if remedy:
        return remedy
      continue
    if (tried := tried + 1) > _TRIES:
      break
    changed = footprint.changed(config, change)
    program = program_lib.build(changed, tpu.devices(place.name))
    if (answer := plan(program, place, dump))["fits"]:
      estimate = _estimate(changed, {"work": _work(changed)} | answer, place)
      return remedy | {"needed": answer["needed"], "estimate": estimate}
  return None


def _smallest(
  config: ConfigDict, place: Slice, factor: float
) -> dict[str, Any] | None:
  """The smallest slice of the generation that fits, by the formula."""
  for other in slices(place.name.partition(":")[0]):
    try:
      total = footprint.divide(config, other.devices, True, factor)["total"]
    except ConfigError:  # a mesh or batch that it does not divide
      continue
    if total <= (1 - _MARGIN) * other.hbm:
      return {"topology": other.name, "formula": total}
  return None
