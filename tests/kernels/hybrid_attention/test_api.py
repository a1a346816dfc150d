"""Every implementation of hybrid attention against float64 and references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.kernels import hybrid_attention as package
from arflow_jax.kernels.hybrid_attention import hybrid_attention
from arflow_jax.kernels.hybrid_attention.cases import SMALL, Case
from tests.conftest import parity_files, relative_error
from tests.kernels.hybrid_attention import float64

IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu_interpret"]


def _misfit(implementation, case, dtype="float32"):
  return package.misfit(
    implementation,
    tokens=case.tokens,
    heads=case.heads,
    head=case.head,
    dtype=dtype,
  )


FORMS = {
  "plain": {},
  "fused": dict(normalize=True, gated=True),
  "normalized": dict(normalize=True),
  "gated": dict(gated=True),
}


def _served(fast):
  """Every implementation, form and case it serves; slow but for some."""
  return [
    pytest.param(
      case,
      name,
      form,
      id=f"{name}-{form}-{case.name}",
      marks=[] if fast(case, name, form) else pytest.mark.slow,
    )
    for case in SMALL
    for name in IMPLEMENTATIONS
    for form in FORMS
    if not _misfit(name, case)
    and (case == SMALL[0] or form in ("plain", "fused"))
  ]


@functools.cache
def _program(implementation, images, normalize, dtype):
  """The operator with its gradients, compiled once a shape."""

  def loss(given, w, w_state):
    out, state = hybrid_attention(
      **given,
      num_chunks=images,
      normalize=normalize,
      implementation=implementation,
    )
    assert out.dtype == dtype
    assert state.dtype == jnp.float32
    total = jnp.sum(out.astype(jnp.float32) * w) + jnp.sum(state * w_state)
    return total, (out, state)

  return jax.jit(jax.grad(loss, has_aux=True))


def run(
  implementation,
  given,
  case,
  *,
  normalize=False,
  gated=False,
  dtype=jnp.float32,
):
  """Output, final state and gradients of the loss of `float64.inputs`."""
  given = {name: jnp.asarray(x) for name, x in given.items()}
  w, w_state = given.pop("w"), given.pop("w_state")
  for name in ("q", "k", "v", "output_gate"):
    given[name] = given[name].astype(dtype)
  if not gated:
    del given["output_gate"]
  program = _program(implementation, case.images, normalize, dtype)
  grads, outs = program(given, w, w_state)
  return *outs, grads


def _in_float32(case, implementation, form):
  """Fast: both optimised forms of all; all their forms on the first case."""
  if implementation == "reference":
    return form == "fused" and case in (SMALL[0], SMALL[7])
  return form == "fused" or case == SMALL[0]


def _in_bfloat16(case, implementation, form):
  """Fast: the first case, and the kernel's sums over two query tiles."""
  if case == SMALL[3]:
    return implementation == "pallas_tpu_interpret" and form == "fused"
  return case == SMALL[0] and form in ("plain", "fused")


@pytest.mark.parametrize(
  ("case", "implementation", "form"), _served(_in_float32)
)
def test_against_float64(case, implementation, form):
  check_against_float64(case, implementation, FORMS[form])


def check_against_float64(case, implementation, form):
  given = float64.inputs(case)
  out, state, grads = run(implementation, given, case, **form)
  wanted_out, wanted_state, wanted = float64.evaluate(given, case, **form)
  assert relative_error(out, wanted_out) < 1e-5
  assert relative_error(state, wanted_state) < 1e-5
  for name, grad in grads.items():
    assert relative_error(grad, wanted[name]) < 1e-5, name


@pytest.mark.parametrize(
  ("case", "implementation", "form"),
  [p for p in _served(_in_bfloat16) if p.values[1] != "reference"],
)
def test_bfloat16_products_keep_float32_sums(case, implementation, form):
  """Within 0.5% of float64 on the rounded inputs, every gradient too.

  XLA's form within 1%: it rounds what comes out of norms and products.
  But for the gradient of log_gate through the norm: there the gradient of the
  read is orthogonal to the whole output, and the sum over features cancels.
  """
  given, form = float64.inputs(case), FORMS[form]
  for name in ("q", "k", "v", "output_gate"):
    given[name] = np.asarray(
      jnp.asarray(given[name]).astype(jnp.bfloat16).astype(jnp.float32)
    )
  out, state, grads = run(
    implementation, given, case, dtype=jnp.bfloat16, **form
  )
  wanted_out, wanted_state, wanted = float64.evaluate(given, case, **form)

  def error(ours, wanted):  # of the whole array, in the Euclidean norm
    ours = np.asarray(ours.astype(jnp.float32), np.float64)
    return np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)

  close = 1e-2 if implementation == "xla" else 5e-3
  assert error(out, wanted_out) < close
  assert error(state, wanted_state) < close
  for name, grad in grads.items():
    norm_of_gate = "gated" in form and name == "log_gate"
    limit = 6e-2 if norm_of_gate else close
    assert error(grad, wanted[name]) < limit, name


@pytest.mark.parametrize("part", ["out", "state"])
def test_float64_gradients_are_slopes(part):
  """The yardstick itself, by central differences along random directions."""
  case, rs = SMALL[6], np.random.RandomState(1)
  given = {k: x.astype(np.float64) for k, x in float64.inputs(case).items()}
  given["w_state" if part == "out" else "w"] *= 0
  loss = lambda x: sum(
    (a * b).sum()
    for a, b in zip(
      float64.evaluate(x, case, **FORMS["fused"]), (x["w"], x["w_state"])
    )
  )
  grads = float64.evaluate(given, case, **FORMS["fused"])[2]
  for name in float64.NAMES:
    direction = rs.standard_normal(given[name].shape)
    ends = [
      loss(given | {name: given[name] + sign * 1e-6 * direction})
      for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / 2e-6
    assert (grads[name] * direction).sum() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", parity_files("hybrid_attention*"))
def test_published(path, load_parity, implementation, subtests):
  z = load_parity(path)
  for shape in z.cases("shapes"):
    with subtests.test(implementation, **shape):
      _check_published(z, shape, implementation)


def _check_published(z, shape, implementation):
  case = Case(
    shape["B"],
    shape["images"],
    shape["tokens_per_image"],
    shape["heads"],
    shape["head_dim"],
  )
  if reason := _misfit(implementation, case):
    pytest.skip(reason)
  at = f"s{shape['index']}"

  def pack(x):  # [B, H, T, D] -> packed
    return jnp.moveaxis(x, 1, 2).reshape(case.batch, -1, case.heads * case.head)

  q, k, v, w = (pack(z[f"in/{at}/{n}"]) for n in "qkvw")
  g = jnp.moveaxis(z[f"in/{at}/g"], 1, 2)
  for kind in ("zero", "state"):
    state = z[f"in/{at}/last_hidden_state"] if kind == "state" else None

    def loss(q, k, v, g, state):
      out, final = hybrid_attention(
        q, k, v, g, state, num_chunks=case.images, implementation=implementation
      )
      return jnp.sum(out * w), (out, final)

    wrt = (0, 1, 2, 3) + ((4,) if kind == "state" else ())
    run = jax.jit(jax.grad(loss, wrt, has_aux=True))
    grads, (out, final) = run(q, k, v, g, state)
    base = f"out/{at}/{kind}/"
    assert relative_error(out, pack(z[base + "o"])) < 1e-5
    assert relative_error(final, z[base + "final_state"]) < 1e-5
    for name, grad in zip("qkv", grads):
      assert relative_error(grad, pack(z[f"{base}grad_{name}"])) < 1e-5
    wanted = np.moveaxis(z[base + "grad_g"], 1, 2)
    assert relative_error(grads[3], wanted) < 1e-5
    if kind == "state":
      wanted = z[base + "grad_last_hidden_state"]
      assert relative_error(grads[4], wanted) < 1e-5


@pytest.mark.parametrize(
  ("implementation", "opaque"),
  [(name, False) for name in IMPLEMENTATIONS] + [(IMPLEMENTATIONS[-1], True)],
)
def test_state_is_right_for_any_number_of_chunks_per_call(
  implementation, opaque
):
  case = SMALL[2]._replace(images=3, tokens=16)
  given = float64.inputs(case)
  names = ("q", "k", "v", "log_gate", "output_gate")

  @jax.jit
  def run(tokens, state):
    return hybrid_attention(
      **tokens,
      state=state,
      num_chunks=tokens["q"].shape[1] // case.tokens,
      opaque_state=opaque,
      implementation=implementation,
    )

  whole, last = run({name: given[name] for name in names}, None)
  held = (1, 2, 64, 128)  # two groups of two heads: [B, groups, D, lanes]
  packed = opaque and implementation == "pallas_tpu_interpret"
  assert last.shape == (held if packed else (1, 4, 64, 64))
  assert last.shape == package.state_shape(
    batch=1,
    tokens=case.tokens,
    heads=4,
    head=64,
    dtype=jnp.float32,
    opaque_state=opaque,
    implementation=implementation,
  )
  outs, start, state = [], 0, None
  for images in (2, 1):
    stop = start + images * case.tokens
    part = {name: given[name][:, start:stop] for name in names}
    out, state = run(part, state)
    outs.append(out)
    start = stop
  np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=1e-4)
  np.testing.assert_allclose(state, last, atol=1e-4)


@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_gates_and_scores_stay_finite(implementation, form):
  case = SMALL[0]
  given = float64.inputs(case)
  for name, factor in (("q", 100), ("k", 100), ("log_gate", 1e4)):
    given[name] = given[name] * np.float32(factor)
  given["output_gate"] *= np.float32(1e3)
  for x in jax.tree.leaves(run(implementation, given, case, **FORMS[form])):
    assert np.isfinite(x).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_state_is_a_state_of_zeros(implementation):
  case = SMALL[0]
  given = float64.inputs(case)
  given["state"] *= 0
  wanted = run(implementation, given, case)
  del given["state"]
  ours = run(implementation, given, case)
  wanted[-1].pop("state")
  for a, b in zip(*map(jax.tree.leaves, (ours, wanted)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_chunks": 3}, "num_chunks=3 does not divide"),
    ({"log_gate": jnp.zeros((2, 80, 3)), "state": None}, "3 heads"),
    ({"log_gate": jnp.zeros((2, 80, 2), jnp.bfloat16)}, "must be float32"),
    ({"state": jnp.zeros((2, 2, 16, 16))}, "state has shape"),
    ({"output_gate": jnp.zeros((2, 80, 32))}, "output_gate"),
    (
      {"v": jnp.zeros((2, 80, 64), jnp.bfloat16)},
      "v is bfloat16, q is float32",
    ),
    (
      {"state": jnp.zeros((2, 2, 32, 32), jnp.bfloat16)},
      "state must be float32",
    ),
    (
      {"state": jnp.zeros((2, 1, 32, 64)), "opaque_state": True},
      r"opaque state has shape \(2, 1, 32, 64\), xla holds \(2, 2, 32, 32\)",
    ),
    ({"implementation": "triton"}, "implementation='triton': unknown"),
    ({"implementation": "pallas_tpu"}, "'pallas_tpu': it needs a TPU, this is"),
    ({"implementation": "xla_cudnn"}, "'xla_cudnn': it needs an NVIDIA GPU"),
  ],
)
def test_misfits_are_refused(change, message):
  given = float64.inputs(SMALL[0])
  kwargs = {
    name: jnp.asarray(given[name])
    for name in ("q", "k", "v", "log_gate", "state")
  }
  kwargs = kwargs | dict(num_chunks=5) | change
  with pytest.raises(Exception, match=message):
    hybrid_attention(**kwargs)


@pytest.mark.parametrize(
  ("size", "message"),
  [
    (dict(tokens=16, heads=16, head=72), "the head size is 72"),
    (dict(tokens=16, heads=3, head=64), "the width 192 of 3 heads"),
    (dict(tokens=9, heads=2, head=64), "9 tokens"),
    (dict(tokens=16, heads=2, head=64, dtype="float16"), "q is float16"),
    (dict(tokens=65536, heads=2, head=64), "do not fit into VMEM"),
  ],
)
def test_sizes_no_kernel_serves_are_named(size, message):
  size = dict(dtype="float32") | size
  assert message in package.misfit("pallas_tpu", **size)
  assert package.misfit("xla", **size) is None
