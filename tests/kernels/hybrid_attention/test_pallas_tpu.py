"""The TPU kernels on a machine without a TPU: lowering, compiling, bytes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from arflow_jax.analysis import tpu
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
from tests.conftest import relative_error
from tests.kernels.hybrid_attention import float64
from tests.kernels.hybrid_attention.test_api import run

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


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", PUBLISHED_HEADS)
def test_every_published_size_lowers(size, chip):
  kind, cores = CHIPS[chip]
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
  sizes = itertools.product((64, 256), (5, 1), (BFLOAT16, FLOAT32))
  for tokens, images, dtype in sizes:
    case = published(size, tokens, images, batch=2)
    _, _, both, args = problem(case, dtype)
    with jax.sharding.use_abstract_mesh(mesh):
      exported = jax.export.export(jax.jit(both), platforms=["tpu"])(*args)
    # The best implementation on a TPU is the kernel: one each way.
    assert exported.mlir_module().count("tpu_custom_call") == 2


# batch, images, tokens, heads, head; type; chip; bundles an image each way.
COMPILED = [
  (published("XL", 256, 5, 32), BFLOAT16, "v5e", (10_000, 21_000)),
  (published("XL", 64, 5, 32), BFLOAT16, "v5e", (2_500, 5_250)),
  (published("XL", 256, 1, 8), BFLOAT16, "v6e", None),
  (published("B", 256, 5, 8), BFLOAT16, "v5p", None),
  (published("S", 256, 5, 8), FLOAT32, "v5e", None),
  (Case(4, 2, 144, 8, 32), BFLOAT16, "v5e", None),
  (Case(4, 2, 16, 2, 128), BFLOAT16, "v5e", None),
]


@pytest.mark.parametrize(
  ("case", "dtype", "chip", "limits"),
  [
    pytest.param(*row, id=f"{row[2]}-{row[0].name}-{jnp.dtype(row[1])}")
    for row in COMPILED
  ],
)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
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
  activation = math.prod(args[1].shape)
  assert tpu.copies(compiled, activation) == []
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
  given = float64.inputs(case)
  monkeypatch.setattr(plan_lib.Plan, "per_program", groups)
  form = dict(normalize=True, gated=True)
  out, state, grads = run("pallas_tpu_interpret", given, case, **form)
  wanted_out, wanted_state, wanted = float64.evaluate(given, case, **form)
  assert relative_error(out, wanted_out) < 1e-5
  assert relative_error(state, wanted_state) < 1e-5
  for name, grad in grads.items():
    assert relative_error(grad, wanted[name]) < 1e-5, name


@pytest.mark.parametrize("case", [SMALL[0], SMALL[2]], ids=lambda c: c.name)
def test_no_races_and_no_unwritten_memory(case, capfd):
  """The kernels alone: interpreted so, they do not go with jax.checkpoint."""
  plan = plan_lib.Plan(*case, jnp.dtype("float32"), gated=True, stateful=True)
  rs = np.random.RandomState(0)
  arrays = plan.arrays

  def draw(like):
    return jnp.asarray(rs.standard_normal(like.shape), jnp.float32)

  tokens = [draw(arrays.tokens) for _ in range(5)]
  q, k, v, gate, d_out = tokens
  scales, memory = abs(draw(arrays.scales)), draw(arrays.memory)
  read = jnp.exp(-abs(draw(arrays.rows))).reshape(
    case.batch, case.images, case.heads, case.tokens
  )
  decay = jnp.exp(-abs(draw(arrays.features)))
  interpret = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan"
  )
  operands = [q, k, v, scales, read, decay, gate]
  outs = forward_lib.forward(
    plan, *operands, memory, save=True, interpret=interpret
  )
  grads = backward_lib.backward(
    plan, operands, list(outs[2:]), d_out, memory, interpret=interpret
  )
  for x in (*outs, *grads):
    assert np.isfinite(x).all()
  assert "RACE" not in capfd.readouterr().out
