"""Every implementation of hybrid attention against float64 and references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.kernels.hybrid_attention import hybrid_attention
from arflow_jax.kernels.hybrid_attention.cases import SMALL
from tests.conftest import parity_files, relative_error

IMPLEMENTATIONS = ["reference", "xla", None]


def _inputs(case, seed=0, dtype=np.float32):
  rs = np.random.RandomState(seed)
  width, length = case.heads * case.head, case.images * case.tokens
  q, k, v, w = rs.standard_normal((4, case.batch, length, width))
  gate = rs.standard_normal((case.batch, length, case.heads))
  gate = -np.log1p(np.exp(-gate)) / 16
  state = rs.standard_normal((case.batch, case.heads, case.head, case.head))
  return tuple(x.astype(dtype) for x in (q, k, v, gate, state, w))


def _float64(q, k, v, gate, state, case):
  """The equations of the spec, token by token where it matters, in float64."""
  out = np.zeros(q.shape)
  memory = np.array(state)
  for b in range(case.batch):
    for h in range(case.heads):
      lanes = slice(h * case.head, (h + 1) * case.head)
      for s in range(case.images):
        rows = slice(s * case.tokens, (s + 1) * case.tokens)
        qs, vs, g = q[b, rows, lanes], v[b, rows, lanes], gate[b, rows, h]
        ks = k[b, rows, lanes] / np.sqrt(case.head)
        scores = np.exp(qs @ ks.T)
        inner = scores / scores.sum(1, keepdims=True) @ vs
        decayed = np.exp(np.cumsum(g))[:, None] * qs
        out[b, rows, lanes] = inner + decayed @ memory[b, h]
        memory[b, h] = np.exp(g.mean()) * memory[b, h] + ks.T @ vs
  return out, memory


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward_against_float64(case, implementation):
  *inputs, _ = _inputs(case)
  wanted = _float64(*(x.astype(np.float64) for x in inputs), case)
  out, state = hybrid_attention(
    *map(jnp.asarray, inputs),
    num_chunks=case.images,
    implementation=implementation,
  )
  assert out.dtype == state.dtype == jnp.float32
  assert relative_error(out, wanted[0]) < 1e-5
  assert relative_error(state, wanted[1]) < 1e-5


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", SMALL[2:4], ids=str)
def test_gradients_against_finite_differences(case, implementation):
  """Central differences of the float64 equations, through out and state."""
  *inputs, w = (x.astype(np.float64) for x in _inputs(case))
  rs = np.random.RandomState(1)
  w_state = rs.standard_normal(inputs[-1].shape)

  def exact(*args):
    out, state = _float64(*args, case)
    return (out * w).sum() + (state * w_state).sum()

  def ours(*args):
    out, state = hybrid_attention(
      *args, num_chunks=case.images, implementation=implementation
    )
    return jnp.sum(out * w) + jnp.sum(state * w_state)

  as32 = [jnp.asarray(x, jnp.float32) for x in inputs]
  grads = jax.grad(ours, argnums=(0, 1, 2, 3, 4))(*as32)
  for i, grad in enumerate(grads):
    direction = rs.standard_normal(inputs[i].shape)
    ends = []
    for sign in (1, -1):
      moved = list(inputs)
      moved[i] = moved[i] + sign * 1e-5 * direction
      ends.append(exact(*moved))
    slope = (ends[0] - ends[1]) / 2e-5
    assert abs((np.asarray(grad) * direction).sum() - slope) < 1e-3 * max(
      1, abs(slope)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", parity_files("hybrid_attention*"))
def test_published(path, load_parity, implementation):
  z = load_parity(path)
  for shape in z.meta["shapes"]:
    images, heads = shape["images"], shape["heads"]
    batch = shape["B"]
    at = f"s{shape['index']}"

    def pack(x, batch=batch, heads=heads):  # [B, H, T, ...] -> packed
      return jnp.moveaxis(x, 1, 2).reshape(batch, -1, heads * x[0, 0, 0].size)

    q, k, v, w = (pack(z[f"in/{at}/{n}"]) for n in "qkvw")
    g = jnp.moveaxis(z[f"in/{at}/g"], 1, 2)
    for kind in ("zero", "state"):
      state = z[f"in/{at}/last_hidden_state"] if kind == "state" else None

      def loss(q, k, v, g, state, images=images, w=w):
        out, final = hybrid_attention(
          q, k, v, g, state, num_chunks=images, implementation=implementation
        )
        return jnp.sum(out * w), (out, final)

      wrt = (0, 1, 2, 3) + ((4,) if kind == "state" else ())
      if state is not None:
        state = jnp.asarray(state)
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_is_right_for_any_number_of_chunks_per_call(implementation):
  case = SMALL[0]
  q, k, v, gate, state, _ = map(jnp.asarray, _inputs(case))
  run = lambda rows, state, n: hybrid_attention(
    q[:, rows],
    k[:, rows],
    v[:, rows],
    gate[:, rows],
    state,
    num_chunks=n,
    implementation=implementation,
  )
  whole, last = run(slice(None), state, case.images)
  outs, start = [], 0
  for images in (2, 1, 2):
    stop = start + images * case.tokens
    out, state = run(slice(start, stop), state, images)
    outs.append(out)
    start = stop
  np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=1e-4)
  np.testing.assert_allclose(state, last, atol=1e-4)


def test_bfloat16_products_keep_float32_sums():
  case = SMALL[0]
  *inputs, _ = _inputs(case)
  wanted = _float64(*(x.astype(np.float64) for x in inputs), case)
  q, k, v, gate, state = map(jnp.asarray, inputs)
  half = (x.astype(jnp.bfloat16) for x in (q, k, v))
  out, state = hybrid_attention(*half, gate, state, num_chunks=case.images)
  assert out.dtype == jnp.bfloat16
  assert state.dtype == jnp.float32
  assert relative_error(out.astype(jnp.float32), wanted[0]) < 0.02
  assert relative_error(state, wanted[1]) < 0.02


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_gates_and_scores_stay_finite(implementation):
  case = SMALL[0]
  q, k, v, gate, state, _ = map(jnp.asarray, _inputs(case))

  def loss(*args):
    out, final = hybrid_attention(
      *args, num_chunks=case.images, implementation=implementation
    )
    return jnp.sum(out) + jnp.sum(final), (out, final)

  args = (100 * q, 100 * k, v, 1e4 * gate, state)
  grads, outs = jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True)(*args)
  for x in jax.tree.leaves((grads, outs)):
    assert np.isfinite(x).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_chunks": 3}, "num_chunks=3 does not divide"),
    ({"implementation": "triton"}, "implementation='triton' is unknown"),
    ({"log_gate": jnp.zeros((2, 80, 3)), "state": None}, "3 heads"),
    ({"log_gate": jnp.zeros((2, 80, 2), jnp.bfloat16)}, "must be float32"),
    ({"state": jnp.zeros((2, 2, 16, 16))}, "state has shape"),
  ],
)
def test_misfits_are_refused(change, message):
  q, k, v, gate, state, _ = map(jnp.asarray, _inputs(SMALL[0]))
  kwargs = dict(log_gate=gate, state=state, num_chunks=5) | change
  with pytest.raises(Exception, match=message):
    hybrid_attention(q, k, v, **kwargs)
