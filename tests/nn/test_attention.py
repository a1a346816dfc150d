"""Attention against float64, its axes, and heads split over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from arflow_jax import branches
from arflow_jax.config import flatten
from arflow_jax.nn import attention, layers, rope
from arflow_jax.parallel import mesh as mesh_lib
from tests.conftest import relative_error
from tests.tiny import tiny_config

HEADS, SIZE, WIDTH = 3, 4, 10


def _inputs(n, m):
  rs = np.random.RandomState(0)
  shapes = [(2, n, HEADS, SIZE), (2, m, HEADS, SIZE), (2, m, HEADS, SIZE)]
  return [rs.standard_normal(shape) for shape in shapes]


def _float64(q, k, v, visible=None):
  scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(SIZE)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  if visible is not None:
    weights = weights * visible
  weights /= weights.sum(-1, keepdims=True)
  return weights, np.einsum("bhnm,bmhd->bnhd", weights, v)


def test_attention_against_float64():
  given = _inputs(5, 7)
  as32 = [jnp.asarray(x, jnp.float32) for x in given]
  _, wanted = _float64(*given)
  assert relative_error(attention.attend(*as32), wanted) < 1e-6
  visible = np.tri(5, 7, 2, dtype=bool)
  weights, wanted = _float64(*given, visible)
  assert relative_error(attention.attend(*as32, visible), wanted) < 1e-6
  seen = []
  attention.attend(*as32, visible, lambda w: seen.append(w) or w)
  assert relative_error(seen[0], weights) < 1e-6


def test_scores_and_softmax_stay_float32():
  """With bfloat16 scores the error would be some ten times as large."""
  given = [4 * x for x in _inputs(5, 7)]
  half = [jnp.asarray(x, jnp.bfloat16) for x in given]
  _, wanted = _float64(*[np.asarray(x, np.float64) for x in half])
  out = attention.attend(*half)
  assert out.dtype == jnp.bfloat16
  assert relative_error(out.astype(jnp.float32), wanted) < 6e-3


def _kwargs():
  return dict(dtype=jnp.float32, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize("parts", [None, 3])
def test_heads_are_a_cut_of_the_plain_projection(parts):
  """The same draw, the same product, in the order (part, head, feature)."""
  split = attention.to_heads(WIDTH, HEADS, SIZE, parts=parts, **_kwargs())
  outs = (HEADS, SIZE) if parts is None else (parts, HEADS, SIZE)
  plain = layers.linear(
    WIDTH, int(np.prod(outs)), ("embed", "heads"), **_kwargs()
  )
  kernel, bias = split.kernel[...], split.bias[...]
  assert kernel.shape == (WIDTH, *outs)
  assert bias.shape == outs
  np.testing.assert_array_equal(
    kernel.reshape(plain.kernel.shape), plain.kernel
  )
  x = jax.random.normal(jax.random.key(0), (2, 5, WIDTH))
  np.testing.assert_array_equal(split(x), plain(x).reshape(2, 5, *outs))

  back = attention.from_heads(HEADS, SIZE, WIDTH, **_kwargs())
  plain = layers.linear(HEADS * SIZE, WIDTH, ("heads", "embed"), **_kwargs())
  assert back.kernel.shape == (HEADS, SIZE, WIDTH)
  np.testing.assert_array_equal(
    back.kernel[...].reshape(-1, WIDTH), plain.kernel
  )
  x = jax.random.normal(jax.random.key(0), (2, 5, HEADS, SIZE))
  np.testing.assert_array_equal(back(x), plain(x.reshape(2, 5, -1)))


def test_values_are_not_rotated():
  qkv = jax.random.normal(jax.random.key(0), (2, 4, 3, HEADS, SIZE))
  table = rope.table((2,), SIZE, 16.0)
  q, k, v = attention.rotated(qkv, table)
  np.testing.assert_array_equal(v, qkv[:, :, 2])
  np.testing.assert_array_equal(q, rope.rotate(qkv[:, :, 0], table))
  np.testing.assert_array_equal(k, rope.rotate(qkv[:, :, 1], table))


@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_a_mesh_axis_splits_whole_heads(family):
  """Each device has all of query, key and value, for half of the heads."""
  changes = {"model__cross_attention": True, "model__head_width": 256}
  branch = branches.build(
    tiny_config(family, **changes if family == "flowar" else {})
  )
  shapes = jax.eval_shape(branch.init, jax.random.key(0))
  mesh = AbstractMesh((1, 1, 2), mesh_lib.AXES)
  placed = mesh_lib.param_shardings(branch.axes, shapes, mesh)
  shards = {
    name: sharding.shard_shape(flatten(shapes)[name].shape)
    for name, sharding in flatten(placed).items()
    if "tensor" in sharding.spec and ".mlp." not in name
  }
  if family == "arflow":
    to, back = (2, 16, 1, 8), (2, 1, 8, 16)
    wanted = {f"blocks.attention.{k}_proj.kernel": to for k in "qkv"}
    wanted["blocks.attention.gate_proj.kernel"] = to
    wanted["blocks.attention.out_proj.kernel"] = back
    wanted["blocks.attention.decay_proj.kernel"] = (2, 16, 1)
  else:
    wanted = {}
    for half in ("encoder", "decoder"):
      wanted[half + ".qkv.kernel"] = (1, 16, 3, 1, 8)
      wanted[half + ".qkv.bias"] = (1, 3, 1, 8)
      wanted[half + ".proj.kernel"] = (1, 1, 8, 16)
    wanted["head.blocks.attention.qkv.kernel"] = (1, 256, 3, 2, 64)
    wanted["head.blocks.attention.proj.kernel"] = (1, 2, 64, 256)
    wanted["head.blocks.cross.q.kernel"] = (1, 256, 2, 64)
    wanted["head.blocks.cross.kv.kernel"] = (1, 16, 2, 2, 64)
    wanted["head.blocks.cross.proj.kernel"] = (1, 2, 64, 256)
  assert shards == wanted
