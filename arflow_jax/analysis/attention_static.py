"""What the TPU compiler says of hybrid attention and of the whole train step.

Nothing is run: see `analysis.tpu` for what the figures mean.
"""

import collections
import itertools
import os
import time
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

from arflow_jax.analysis import chips, tpu
from arflow_jax.analysis.attention_bench import Problem, check, temporary
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import program as program_lib

# One slice of each generation, all of the same number of chips.
PODS = {"v5e": "v5e:16x16", "v6e": "v6e:16x16", "v5p": "v5p:4x8x8"}
_CHIPS = 256


def compiled(
  problems: list[Problem],
  names: list[str] | None,
  chip: str,
  dump: str | os.PathLike,
) -> dict[str, Any]:
  """What the compiler says of implementations on one chip.

  Args:
    problems: what to compile.
    names: implementations, or None for the XLA form and the kernels.
    chip: a key of `tpu.CHIPS`.
    dump: the folder that `tpu.prepare` was given.

  Raises:
    ConfigError: a named implementation that cannot serve.
  """
  mesh = tpu.chip(chip)
  names = names or ["xla", "pallas_tpu"]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    check(problems, names)
  rows = []
  for problem in tqdm.tqdm(problems, unit="problem", leave=False):
    for name in names:
      function, args = problem.function(name), problem.arguments
      compiled = tpu.compile_for(mesh, function, *args)
      cycles, _ = tpu.estimated_cycles(compiled)
      row = problem.row(name)
      if name == "pallas_tpu":
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
          calls = tpu.calls(function, *args)
        kernels = tpu.kernels(compiled, calls, dump)
        images = problem.case.batch * problem.case.images
        bundles = [k.bundles * k.call.programs for k in kernels]
        moved = sum(kernel.call.moved for kernel in kernels)
        cycles += sum(bundles)
        row |= {
          "kernel bytes / floor": moved / problem.floor_bytes,
          "bundles an image": " + ".join(f"{b // images}" for b in bundles),
          "VMEM MiB": max(kernel.vmem for kernel in kernels) / 2**20,
        }
      row |= {
        "cycles": cycles,
        "program bytes / floor": (
          compiled.cost_analysis()["bytes accessed"] / problem.floor_bytes
        ),
        "temporary MiB": temporary(compiled),
      }
      rows.append(row)
  return {
    "machine": f"{chip}, jax {jax.__version__}, {tpu.version()}",
    "note": (
      "static figures of the compiler, nothing was run; cycles are XLA's"
      " estimates and, of kernels, bundles times programs"
    ),
    "rows": rows,
  }


def check_step(config: ConfigDict, batches: list[int]) -> None:
  """Raises ConfigError for a mesh or a batch that the slice does not fit."""
  mesh_lib.sizes(config.mesh, _CHIPS)
  for batch in batches:
    if batch % _CHIPS or batch < 1:
      raise ConfigError(f"--step_batch={batch} is not a multiple of {_CHIPS}")


def steps(
  config: ConfigDict, chip: str, batches: list[int], dump: str | os.PathLike
) -> dict[str, Any]:
  """Estimated cycles of a train step on 256 chips, full remat, bfloat16.

  Args:
    config: of the network and of the mesh.
    chip: a key of `PODS`.
    batches: items of a step, over all chips.
    dump: the folder that `tpu.prepare` was given.

  Raises:
    ConfigError: a batch or a mesh that does not make 256 chips.
  """
  rows = []
  todo = list(itertools.product(batches, ("xla", "pallas_tpu")))
  for batch, name in tqdm.tqdm(todo, unit="train step", leave=False):
    config = config.copy_and_resolve_references()
    config.unlock()
    config.batch_size = batch
    config.model.update(dtype="bfloat16", remat="full", attention=name)
    program = program_lib.build(config, tpu.devices(PODS[chip]))
    begin = time.monotonic()
    place = chips.parse(PODS[chip])
    compiled, kernels = compile_step(program, dump, place.chip)
    cycles, runs = tpu.estimated_cycles(compiled)
    own = sum(runs[kernel] * kernels[kernel] for kernel in runs)
    total = cycles + own
    if name == "xla":
      whole = total
    rows.append(
      {
        "batch": batch,
        "implementation": name,
        "XLA cycles": cycles,
        "kernel cycles": own,
        "cycles": total,
        "against xla": f"{total / whole - 1:+.1%}",
        "temporary MiB": temporary(compiled),
        "compile s": time.monotonic() - begin,
      }
    )
  mesh = " x ".join(f"{k} {v}" for k, v in program.mesh.shape.items())
  machine = f"{PODS[chip]}, {tpu.version()}, {mesh}"
  return {"machine": machine, "rows": rows}


def compile_step(
  program: program_lib.Program, dump: str | os.PathLike, chip: chips.Chip
) -> tuple[Any, dict[str, int]]:
  """The compiled step, and cycles of a whole call of each of its kernels.

  These are its bundles, or what its blocks take between HBM and VMEM at the
  published rate where that is longer.
  """
  step, mesh = program.step, program.mesh
  args = (program.abstract_state, program.abstract_batch)
  compiled = tpu.compile_for(mesh, step, *args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    calls = {c.name: c for c in tpu.calls(step, *args)}
  # Of calls that are the same the compiler schedules one.
  names = collections.defaultdict(list)
  for name in tpu.estimated_cycles(compiled)[1]:
    names[next(call for call in calls if call in name)].append(name)
  rate = chip.hbm_rate / chip.devices / chip.clock  # bytes a cycle
  cycles = {}
  for kernel, found in names.items():
    call = calls[kernel]
    scheduled = {name: tpu.bundles(name, dump) for name in found}
    most = max(filter(None, scheduled.values()))
    for name in found:
      own = scheduled[name] or most
      cycles[name] = max(own * call.programs, int(call.moved / rate))
  return compiled, cycles
