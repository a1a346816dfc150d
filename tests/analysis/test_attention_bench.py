"""The benchmark of hybrid attention: what it measures, counts and prints."""

import jax
import jax.numpy as jnp
import pytest

from arflow_jax.analysis import attention_bench as bench
from arflow_jax.analysis import flops
from arflow_jax.errors import ConfigError
from arflow_jax.kernels.hybrid_attention.cases import Case, floor_bytes

CASE = Case(batch=2, images=2, tokens=16, heads=2, head=32)


def test_every_implementation_is_timed_beside_the_floor():
  problems = bench.problems([CASE], "float32", "fused")
  measured = bench.timed(problems, None, repeats=3)
  assert [(row["pass"], row["implementation"]) for row in measured["rows"]] == [
    ("forward", "reference"),
    ("forward", "xla"),
    ("forward+backward", "reference"),
    ("forward+backward", "xla"),
  ]
  for row, problem in zip(measured["rows"][::2], problems):
    seconds = row["ms"] / 1e3
    assert row["TFLOP/s"] == pytest.approx(problem.flops / seconds / 1e12)
    assert row["GB/s"] == pytest.approx(problem.floor_bytes / seconds / 1e9)
    assert row["x floor"] == pytest.approx(row["ms"] / row["floor ms"])
  text = bench.table(measured)
  assert "B2-S2-N16-H2-D32" in text
  assert "forward+backward" in text


def test_model_flops_are_those_of_the_products():
  forward, both = bench.problems([CASE], "float32", "plain")
  triangle = 2 * 2 * 2 * 2 * 16**2  # the cumulative sum of the gates
  counted = flops.count(forward.function("xla"), *forward.arguments)
  assert counted == forward.flops + triangle
  assert both.flops == 3 * forward.flops


def test_the_floor_moves_everything_once():
  case, size = CASE, 2
  given = {
    "q": (2, 32, 64),
    "k": (2, 32, 64),
    "v": (2, 32, 64),
    "gate": (2, 32, 64),
  }
  tokens = jax.eval_shape(
    lambda: [jnp.zeros(s, jnp.bfloat16) for s in given.values()]
  )
  operands = sum(x.size * size for x in tokens)
  operands += 2 * 32 * 2 * 4 + 2 * 2 * 32 * 32 * 4  # log_gate and state
  results = tokens[0].size * size + 2 * 2 * 32 * 32 * 4
  forward = floor_bytes(case, size, fused=True, backward=False)
  both = floor_bytes(case, size, fused=True, backward=True)
  assert forward == operands + results
  assert both == forward + operands + results + operands


def test_what_cannot_run_is_refused_before_anything_runs():
  problems = bench.problems([CASE], "float32", "plain")
  with pytest.raises(ConfigError, match="pallas_tpu: it needs a TPU"):
    bench.timed(problems, ["xla", "pallas_tpu"], repeats=3)
  with pytest.raises(ConfigError, match="implementations=cuda: unknown"):
    bench.timed(problems, ["cuda"], repeats=3)


def test_what_does_not_fit_the_memory_is_refused():
  large = bench.problems([CASE._replace(batch=10**9)], "float32", "plain")
  with pytest.raises(ConfigError, match=r"B1000000000-S2.* GB.*--batch"):
    bench.timed(large, ["xla"], repeats=3)
