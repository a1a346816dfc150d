"""The TPU kernels on a machine without a TPU: lowering, compiling, bytes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from arflow_jax.analysis import attention_bench, attention_static, tpu
from arflow_jax.kernels.hybrid_attention import hybrid_attention
from arflow_jax.kernels.hybrid_attention.cases import (
  PUBLISHED_HEADS,
  SMALL,
  Case,
  floor_bytes,
  published,
)
from arflow_jax.kernels.hybrid_attention.pallas_tpu import (
  backward as backward_lib,
)
from arflow_jax.kernels.hybrid_attention.pallas_tpu import (
  forward as forward_lib,
)
from arflow_jax.kernels.hybrid_attention.pallas_tpu import plan as plan_lib
from configs.arflow import get_config
from tests.kernels.hybrid_attention.test_api import (
  FORMS,
  check_against_float64,
)
from tests.kernels.hybrid_attention.test_copies import copies

BFLOAT16, FLOAT32 = jnp.bfloat16, jnp.float32
CHIPS = {  # device kind and cores
  "v5e": ("TPU v5 lite", 1),
  "v5p": ("TPU v5", 2),
  "v6e": ("TPU v6 lite", 1),
}


def problem(case, dtype, *, gated=True, stateful=True):
  """Forward and backward of the operator, and the shapes of its arguments."""
  shape = jax.ShapeDtypeStruct
  length, width = case.images * case.tokens, case.heads * case.head
  tokens = shape((case.batch, length, width), dtype)
  log_gate = shape((case.batch, length, case.heads), FLOAT32)
  memory = shape((case.batch, case.heads, case.head, case.head), FLOAT32)

  def forward(q, k, v, log_gate, state, gate):  # gated: as ARFlow calls it
    return hybrid_attention(
      q,
      k,
      v,
      log_gate,
      state if stateful else None,
      num_chunks=case.images,
      normalize=gated,
      output_gate=gate if gated else None,
    )

  def both(args, d_out, d_state):
    outs, pullback = jax.vjp(forward, *args)
    return outs, pullback((d_out, d_state))

  args = (tokens, tokens, tokens, log_gate, memory, tokens)
  return forward, args, both, (args, tokens, memory)


# Every size, chip and type once; all their combinations with --all.
_LOWERED = {
  ("S", "v5e", 64, 5, BFLOAT16),
  ("B", "v5p", 64, 1, FLOAT32),
  ("L", "v6e", 256, 1, BFLOAT16),
  ("XL", "v5e", 256, 5, BFLOAT16),
  ("XL", "v5p", 64, 5, FLOAT32),
}


@pytest.mark.parametrize(
  ("size", "chip", "tokens", "images", "dtype"),
  [
    pytest.param(*row, marks=[] if row in _LOWERED else pytest.mark.slow)
    for row in itertools.product(
      PUBLISHED_HEADS, CHIPS, (64, 256), (5, 1), (BFLOAT16, FLOAT32)
    )
  ],
)
def test_every_published_size_lowers(size, chip, tokens, images, dtype):
  kind, cores = CHIPS[chip]
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
  case = published(size, tokens, images, batch=2)
  _, _, both, args = problem(case, dtype)
  with jax.sharding.use_abstract_mesh(mesh):
    exported = jax.export.export(jax.jit(both), platforms=["tpu"])(*args)
  # The best implementation on a TPU is the kernel: one each way.
  assert exported.mlir_module().count("tpu_custom_call") == 2


# Case; type; chip; limits of bundles an image, each way: about 5% above what
# libtpu 0.0.42 counts of the form with norms and gate.
COMPILED = [
  (published("XL", 64, 5, 32), BFLOAT16, "v5e", (2_300, 4_600)),
  (Case(4, 2, 144, 8, 32), BFLOAT16, "v5e", None),
  (Case(4, 2, 16, 2, 128), BFLOAT16, "v5e", None),
  (Case(2, 2, 64, 2, 64), FLOAT32, "v5p", None),
  (Case(2, 1, 64, 2, 64), BFLOAT16, "v6e", None),
]
COMPILED_SLOWLY = [
  (published("XL", 256, 5, 32), BFLOAT16, "v5e", (7_300, 16_400)),
  (published("XL", 256, 1, 8), BFLOAT16, "v6e", None),
  (published("B", 256, 5, 8), BFLOAT16, "v5p", None),
  (published("L", 256, 5, 8), FLOAT32, "v5e", None),
  (Case(4, 2, 256, 8, 128), FLOAT32, "v5e", None),
]


@pytest.mark.parametrize(
  ("case", "dtype", "chip", "limits", "gated"),
  [
    pytest.param(
      *row,
      gated,
      id=f"{row[2]}-{row[0].name}-{form}",
      marks=[] if row in COMPILED and gated else pytest.mark.slow,
    )
    for row in COMPILED + COMPILED_SLOWLY
    for form, gated in (("gated", True), ("plain", False))
    if gated or row[3]  # the plain form of the sizes that have limits
  ],
)
def test_compiles_without_copies_within_the_limits(
  dump, case, dtype, chip, limits, gated
):
  check_compiled(dump, case, dtype, chip, limits, gated)


def check_compiled(dump, case, dtype, chip, limits, gated):
  _, _, both, args = problem(case, dtype, gated=gated)
  mesh = tpu.chip(chip)
  compiled = tpu.compile_for(mesh, both, *args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    calls = tpu.calls(both, *args)
  kernels = tpu.kernels(compiled, calls, dump)
  assert [kernel.call.name for kernel in kernels] == [
    "hybrid_attention_forward",
    "hybrid_attention_backward",
  ]
  # The state, which is converted, is as large as activations of D tokens.
  plan = plan_lib.Plan(*case, jnp.dtype(dtype))
  state, packed = args[0][4].shape, plan.arrays.memory.shape
  by_group = (*packed[:2], plan.per_group, *state[2:])
  moved = copies(compiled.as_text(), math.prod(args[1].shape)).values()
  assert set(moved) <= {state, packed, by_group}
  if case.head == 64 and case.tokens <= 256:  # others ask for more
    for kernel in kernels:
      assert 0 < kernel.vmem < 16 * 2**20  # the default limit of v5e and v5p
  if limits:
    images = case.batch * case.images
    for kernel, limit in zip(kernels, limits):
      assert 100 < kernel.bundles * kernel.call.programs / images < limit


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=["bf16", "f32"])
@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize("size", PUBLISHED_HEADS)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_published_size_compiles(
  dump, chip, size, tokens, images, dtype, gated
):
  case = published(size, tokens, images, batch=8)
  check_compiled(dump, case, dtype, chip, None, gated)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=["bf16", "f32"])
@pytest.mark.parametrize(("tokens", "images"), [(64, 5), (256, 5), (256, 1)])
@pytest.mark.parametrize("size", ["S", "XL"])
def test_bytes_stay_close_to_the_floor(size, tokens, images, dtype, gated):
  """Forward within 1.15, forward and backward within 1.4 of it."""
  case = published(size, tokens, images, batch=4)
  forward, few, both, args = problem(case, dtype, gated=gated)
  mesh = AbstractMesh(
    (1,),
    ("x",),
    (AxisType.Auto,),
    abstract_device=AbstractDevice(
      device_kind="TPU v5 lite", num_cores=1, platform="tpu"
    ),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    first = sum(call.moved for call in tpu.calls(forward, *few))
    total = sum(call.moved for call in tpu.calls(both, *args))
  size = jnp.dtype(dtype).itemsize
  floor = lambda backward: floor_bytes(
    case, size, fused=gated, backward=backward
  )
  assert 1 <= first / floor(False) < 1.15
  assert 1 <= total / floor(True) < 1.4


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_may_be_cut_into_programs(groups, monkeypatch):
  """Several programs a sequence give what float64 gives."""
  case = Case(2, 3, 32, 8, 64)
  monkeypatch.setattr(plan_lib.Plan, "per_program", groups)
  check_against_float64(case, "pallas_tpu_interpret", FORMS["fused"])


@pytest.mark.parametrize(
  ("case", "full"),
  [
    (SMALL[0]._replace(images=2), True),
    (SMALL[2]._replace(tokens=16), False),
  ],
  ids=["fused", "plain"],
)
def test_no_races_and_no_unwritten_memory(case, full, capfd, monkeypatch):
  """The kernels alone: interpreted so, they do not go with jax.checkpoint."""
  plan = plan_lib.Plan(*case, jnp.dtype("float32"), gated=full, stateful=full)
  monkeypatch.setattr(plan_lib.Plan, "per_program", 1)
  rs = np.random.RandomState(0)
  arrays = plan.arrays

  def draw(like):
    return jnp.asarray(rs.standard_normal(like.shape), jnp.float32)

  q, k, v, gate, d_out = (draw(arrays.tokens) for _ in range(5))
  scales, memory = abs(draw(arrays.scales)), draw(arrays.memory)
  read = jnp.exp(-abs(draw(arrays.rows))).reshape(
    case.batch, case.images, case.heads, case.tokens
  )
  decay = jnp.exp(-abs(draw(arrays.features)))
  operands = [q, k, v, scales, read, decay]

  def run(interpret):
    outs = forward_lib.forward(
      plan,
      *operands,
      gate if full else None,
      memory if full else None,
      save=True,
      interpret=interpret,
    )
    given = operands + [gate] * full
    grads = backward_lib.backward(
      plan, given, list(outs[2:]), d_out, memory, interpret=interpret
    )
    return [*outs, *grads]

  detecting = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
  )
  for ours, wanted in zip(run(detecting), run(True)):
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)
  assert "RACE" not in capfd.readouterr().out


def test_the_memory_is_replaced_in_place(dump):
  """Sampling: what the call before returned goes in, nothing is converted."""
  case = published("B", 64, 1, batch=8)
  plan = plan_lib.Plan(*case, jnp.dtype(BFLOAT16))
  tokens, log_gate = plan.arrays.tokens, (case.batch, case.tokens, case.heads)

  def step(q, k, v, log_gate, state):
    return hybrid_attention(
      q, k, v, log_gate, state, num_chunks=1, opaque_state=True
    )

  compiled = tpu.compile_for(
    tpu.chip("v5e"),
    jax.jit(step, donate_argnums=4),
    *[tokens] * 3,
    jax.ShapeDtypeStruct(log_gate, FLOAT32),
    plan.arrays.memory,
  )
  size = math.prod(plan.arrays.memory.shape)
  assert copies(compiled.as_text(), size) == {}
  assert compiled.memory_analysis().alias_size_in_bytes == 4 * size


@pytest.mark.slow
def test_the_whole_train_step_gains_18_percent(dump):
  """ARFlow-XL/2 at 256 px on a v5e-256, static figures."""
  config = get_config("imagenet256-xl2")
  config.mesh.fsdp = 16
  rows = attention_static.steps(config, "v5e", [256], dump)["rows"]
  xla, kernel = (row["cycles"] for row in rows)
  assert kernel < 0.82 * xla


def test_static_figures_of_both_forms(dump):
  """What the benchmark prints with --topology."""
  problems = attention_bench.problems(
    [Case(2, 2, 16, 2, 64)], "bfloat16", "plain"
  )
  measured = attention_static.compiled(problems, None, "v5e", dump)
  for xla, kernel in zip(measured["rows"][::2], measured["rows"][1::2]):
    assert 0 < kernel["cycles"] < xla["cycles"]
    assert 1 <= kernel["kernel bytes / floor"] < 2
    assert "bundles an image" not in xla
  assert "libtpu" in attention_bench.table(measured)
