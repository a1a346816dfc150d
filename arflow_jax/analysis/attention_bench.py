"""Benchmarks of hybrid attention: its problems, timed here, and their tables.

Times of all implementations are taken in turn, beside the machine's own rates
of a matrix product and of a copy: the floor is what those would need for the
model's FLOPs and for operands and results moved once.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from arflow_jax.analysis import benchmark
from arflow_jax.errors import ConfigError
from arflow_jax.kernels import hybrid_attention as package
from arflow_jax.kernels.hybrid_attention import cases
from arflow_jax.kernels.hybrid_attention.cases import Case
from arflow_jax.parallel import mesh as mesh_lib


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
    ConfigError: a named implementation that cannot run here, or arrays that do
      not fit the memory.
  """
  there = mesh_lib.memory(jax.devices()[:1])
  for problem in problems:
    needed = sum(x.size * x.dtype.itemsize for x in problem.arguments)
    if there is not None and needed > there:
      raise ConfigError(
        f"the arrays of {problem.case.name} take {needed / 1e9:,.1f} GB, and"
        f" the device has {there / 1e9:,.1f} GB: lower --batch, --tokens or"
        " --images"
      )
  known = [name for name in package.IMPLEMENTATIONS if "interpret" not in name]
  check(problems, names or [])
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
          "temporary MiB": temporary(calls[name]),
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


def check(problems: list[Problem], names: list[str]) -> None:
  """Raises ConfigError for an implementation that cannot serve here."""
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
  product, flops = benchmark.product(dtype)
  return flops / _best(product)


def _copy_rate() -> float:
  numbers = jnp.ones(2**26, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  return 2 * numbers.nbytes / _best(lambda: copy(numbers))


def _best(call: Callable[[], Any]) -> float:
  seconds = []
  for _ in range(4):
    begin = time.monotonic()
    jax.block_until_ready(call())
    seconds.append(time.monotonic() - begin)
  return min(seconds[1:])


def temporary(compiled: Any) -> float:
  """MiB of temporaries that a compiled program plans."""
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


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
