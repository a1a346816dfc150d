"""Benchmarks of hybrid attention: timed here, or compiled for a TPU.

Times of all implementations are taken in turn, beside the machine's own rates
of a matrix product and of a copy: the floor is what those would need for the
model's FLOPs and for operands and results moved once.
"""

import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from ml_collections import ConfigDict

from arflow_jax.analysis import benchmark, tpu
from arflow_jax.errors import ConfigError
from arflow_jax.kernels import hybrid_attention as package
from arflow_jax.kernels.hybrid_attention import cases
from arflow_jax.kernels.hybrid_attention.cases import Case
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import program as program_lib

# Slices of 256 chips.
PODS = {"v5e": "v5e:16x16", "v6e": "v6e:16x16", "v5p": "v5p:4x8x8"}


@dataclasses.dataclass(frozen=True)
class Problem:
  """One call of the operator, forward or with its gradients."""

  case: Case
  dtype: str
  fused: bool
  backward: bool

  @property
  def flops(self) -> int:
    return cases.flops(self.case, backward=self.backward)

  @property
  def floor_bytes(self) -> int:
    return cases.floor_bytes(
      self.case,
      jnp.dtype(self.dtype).itemsize,
      fused=self.fused,
      backward=self.backward,
      state=False,
    )

  @property
  def arguments(self) -> tuple[Any, ...]:
    """Shapes of q, k, v, log_gate and output_gate."""
    case = self.case
    length = case.images * case.tokens
    tokens = jax.ShapeDtypeStruct(
      (case.batch, length, case.heads * case.head), self.dtype
    )
    gates = jax.ShapeDtypeStruct((case.batch, length, case.heads), jnp.float32)
    return tokens, tokens, tokens, gates, tokens

  def function(self, implementation: str) -> Callable[..., Any]:
    """The call, a function of `arguments`."""

    def forward(q, k, v, log_gate, gate):
      return package.hybrid_attention(
        q,
        k,
        v,
        log_gate,
        num_chunks=self.case.images,
        normalize=self.fused,
        output_gate=gate if self.fused else None,
        implementation=implementation,
      )

    def both(*args):
      outs, pullback = jax.vjp(forward, *args)
      return outs, pullback(outs)

    return both if self.backward else forward

  def misfit(self, implementation: str) -> str | None:
    """Why an implementation cannot serve on this machine, or None."""
    case = self.case
    return package.misfit(
      implementation,
      tokens=case.tokens,
      heads=case.heads,
      head=case.head,
      dtype=self.dtype,
      batch=case.batch,
    )

  def row(self, implementation: str) -> dict[str, Any]:
    return {
      "case": self.case.name,
      "dtype": self.dtype,
      "form": "fused" if self.fused else "plain",
      "pass": "forward+backward" if self.backward else "forward",
      "implementation": implementation,
    }


def problems(shapes: list[Case], dtype: str, form: str) -> list[Problem]:
  """Forward and forward with backward of each shape."""
  return [
    Problem(case, dtype, form == "fused", backward)
    for case in shapes
    for backward in (False, True)
  ]


def timed(
  problems: list[Problem], names: list[str] | None, repeats: int
) -> dict[str, Any]:
  """Times implementations on this machine.

  Args:
    problems: what to run.
    names: implementations, or None for all but the interpreter.
    repeats: timed calls of each.

  Raises:
    ConfigError: a named implementation that cannot run here.
  """
  known = [name for name in package.IMPLEMENTATIONS if "interpret" not in name]
  _check(problems, names or [])
  product, copy = _product_rate(problems[0].dtype), _copy_rate()
  rows = []
  for problem in tqdm.tqdm(problems, unit="problem", leave=False):
    chosen = names or [n for n in known if problem.misfit(n) is None]
    args = _draw(problem.arguments)
    calls = {
      name: jax.jit(problem.function(name)).lower(*args).compile()
      for name in chosen
    }
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for call in calls.values():
      jax.block_until_ready(call(*args))
    for _ in range(repeats):
      for name, call in calls.items():
        begin = time.monotonic()
        jax.block_until_ready(call(*args))
        times[name].append(time.monotonic() - begin)
    floor = max(problem.flops / product, problem.floor_bytes / copy)
    for name in chosen:
      median = statistics.median(times[name])
      rows.append(
        problem.row(name)
        | {
          "ms": 1e3 * median,
          "TFLOP/s": problem.flops / median / 1e12,
          "GB/s": problem.floor_bytes / median / 1e9,
          "floor ms": 1e3 * floor,
          "x floor": median / floor,
          "temporary MiB": _temporary(calls[name]),
        }
      )
  return {
    "machine": f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
    "note": (
      f"measured here: product {product / 1e12:.3f} TFLOP/s, copy"
      f" {copy / 1e9:.1f} GB/s"
    ),
    "rows": rows,
  }


def _check(problems: list[Problem], names: list[str]) -> None:
  for name in names:
    for problem in problems:
      if reason := problem.misfit(name):
        raise ConfigError(f"--implementations={name}: {reason}")


def _draw(shapes):
  q, k, v, log_gate, gate = (
    jax.random.normal(jax.random.key(i), s.shape, s.dtype)
    for i, s in enumerate(shapes)
  )
  return q, k, v, jax.nn.log_sigmoid(log_gate) / 16, gate


def _product_rate(dtype: str) -> float:
  side = benchmark.product_side()
  matrix = jnp.ones((side, side), dtype)
  precision = "highest" if dtype == "float32" else None
  product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
  return 2 * side**3 / _best(product, matrix)


def _copy_rate() -> float:
  numbers = jnp.ones(2**26, jnp.float32)
  return 2 * numbers.nbytes / _best(jax.jit(lambda x: x + 1), numbers)


def _best(call: Callable, argument: Any) -> float:
  seconds = []
  for _ in range(4):
    begin = time.monotonic()
    jax.block_until_ready(call(argument))
    seconds.append(time.monotonic() - begin)
  return min(seconds[1:])


def _temporary(compiled: Any) -> float:
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def static(
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
    _check(problems, names)
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
        "temporary MiB": _temporary(compiled),
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
  """Raises ConfigError for a mesh or a batch that 256 chips do not divide."""
  mesh_lib.sizes(config.mesh, 256)
  for batch in batches:
    if batch % 256 or batch < 1:
      raise ConfigError(f"--step_batch={batch} is not a multiple of 256")


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
    compiled, bundles = _compile_step(program, dump)
    cycles, runs = tpu.estimated_cycles(compiled)
    own = sum(runs[kernel] * bundles[kernel] for kernel in runs)
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
        "temporary MiB": _temporary(compiled),
        "compile s": time.monotonic() - begin,
      }
    )
  mesh = " x ".join(f"{k} {v}" for k, v in program.mesh.shape.items())
  machine = f"{PODS[chip]}, {tpu.version()}, {mesh}"
  return {"machine": machine, "rows": rows}


def _compile_step(
  program: program_lib.Program, dump: str | os.PathLike
) -> tuple[Any, dict]:
  """The compiled step, and bundles of a whole call of each of its kernels."""
  step, mesh = program.step, program.mesh
  args = (program.abstract_state, program.abstract_batch)
  compiled = tpu.compile_for(mesh, step, *args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    calls = {c.name: c for c in tpu.calls(step, *args)}
  bundles = {}
  for name in tpu.estimated_cycles(compiled)[1]:
    call = next(c for c in calls.values() if c.name in name)
    bundles[name] = tpu.bundles(name, dump) * call.programs
  return compiled, bundles


def table(measured: dict[str, Any]) -> str:
  """All rows, one problem and implementation a line."""
  lines = [measured["machine"], measured["note"], ""]
  return "\n".join(lines) + _grid(measured["rows"])


def step_table(measured: dict[str, Any]) -> str:
  """The train step with each implementation."""
  head = f"ARFlow train step, {measured['machine']}"
  return f"{head}, full remat, bfloat16, per chip\n\n" + _grid(measured["rows"])


def _grid(rows: list[dict[str, Any]]) -> str:
  names = list(dict.fromkeys(name for row in rows for name in row))
  cells = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(line, widths))
    for line in cells
  )


def _cell(value: Any) -> str:
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return "-"
  if isinstance(value, int):
    return f"{value:,}"
  return f"{value:.3g}" if isinstance(value, float) else str(value)
