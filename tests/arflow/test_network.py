"""The ARFlow network against golden and reference values, and its promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arflow_jax import branches
from arflow_jax.arflow.network import RULES, ARFlow, ModelConfig
from arflow_jax.config import make
from arflow_jax.errors import ConfigError
from arflow_jax.kernels import hybrid_attention
from configs.arflow import get_config
from tests.arflow.helpers import (
  GOLDEN,
  golden_network,
  published_network,
  published_weights,
  random_network,
  with_attention,
)
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)
from tests.tiny import batches


def test_golden_forward():
  rs = np.random.RandomState(1234)
  model = golden_network(rs)
  x = rs.standard_normal((2, 5, 4, 8, 8)).astype(np.float32)
  t = np.sort(rs.uniform(size=(2, 5)), axis=1).astype(np.float32)
  np.testing.assert_allclose(
    t[0], [0.23861, 0.25917, 0.41409, 0.54178, 0.72424], atol=1e-5
  )
  out, _ = jax.jit(lambda x, t, y: model(x, t, y))(
    channels_last(x), t, jnp.array([3, 10])
  )
  out = channels_first(out)
  first = [1.12574, -0.43765, 1.32091, 0.47348]
  first += [1.49317, 0.24475, 0.03067, 0.95284]
  last = [1.02688, 0.98067, -0.00677, 0.45474]
  last += [0.35473, 0.74382, 0.36695, -0.04547]
  np.testing.assert_allclose(out[0, 0, 0, 0], first, atol=1e-4)
  np.testing.assert_allclose(out[1, 4, 3, 7], last, atol=1e-4)
  np.testing.assert_allclose(out.mean(), 0.15519, atol=1e-4)
  np.testing.assert_allclose(out.std(), 0.97680, atol=1e-4)
  np.testing.assert_allclose(
    out[0].std((1, 2, 3)),
    [1.04737, 0.91723, 0.98403, 0.92520, 1.04987],
    atol=1e-4,
  )


def _served(model: ARFlow, attention: str | None) -> ARFlow:
  """The network with this attention, or a skip that says why it has none."""
  config = model.config
  reason = attention and hybrid_attention.misfit(
    attention,
    tokens=config.side**2,
    heads=config.num_heads,
    head=config.width // config.num_heads,
    dtype=config.dtype,
  )
  if reason:
    pytest.skip(f"{attention}: {reason}")
  return with_attention(model, attention)


ATTENTIONS = pytest.mark.parametrize(
  "attention", [None, "pallas_tpu_interpret"]
)


@ATTENTIONS
@pytest.mark.parametrize("path", parity_files("arflow_train_forward*"))
def test_train_forward_and_gradients(path, load_parity, attention):
  z = load_parity(path)
  model, _ = published_network(z.params())
  model = _served(model, attention)
  graphdef, state = nnx.split(model, nnx.Param)
  params = nnx.to_pure_dict(state)
  x, w = channels_last(z["in/x"]), channels_last(z["in/w"])
  t = z["in/t"]

  def weighted(params, x, labels):
    out, _ = nnx.merge(graphdef, nnx.State(params))(x, t, labels)
    return jnp.sum(out * w), out

  run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
  (total, out), (grads, grad_x) = run(params, x, jnp.asarray(z["in/y"]))
  assert relative_error(channels_first(out), z["out/model_output"]) < 1e-5
  assert relative_error(total, z["out/weighted_sum"]) < 1e-5
  assert relative_error(channels_first(grad_x), z["out/grad_x"]) < 1e-4
  dropped = jnp.asarray(z["out/label_drop_y"])
  (_, out), _ = run(params, x, dropped)
  wanted = z["out/model_output_label_drop"]
  assert relative_error(channels_first(out), wanted) < 1e-5

  # Gradients travel through the same map as weights; what the file does not
  # hold in full is compared by its norm.
  ours = published_weights(nnx.merge(graphdef, nnx.State(grads)))
  for name, wanted in z.under("out/grad/").items():
    assert relative_error(ours[name], wanted) < 1e-4, name
  for name, wanted in z.under("out/grad_norm/").items():
    assert relative_error(np.linalg.norm(ours[name]), wanted) < 1e-4, name


@pytest.mark.parametrize("path", parity_files("arflow_train_forward*"))
def test_sublayers(path, load_parity):
  z = load_parity(path)
  model, config = published_network(z.params())
  t = jnp.asarray(z["in/t"])
  embedded = model.time_embedding(t)
  wanted = z["out/t_embed"]
  assert relative_error(embedded.reshape(wanted.shape), wanted) < 1e-5
  c = embedded + model.label_embedding(jnp.asarray(z["in/y"]))[:, None]
  assert relative_error(c, z["out/cond"]) < 1e-5
  graphdef, stacked = nnx.split(model.blocks)
  x = jnp.asarray(z["out/x_embed"])
  for layer in range(config.depth):
    params = jax.tree.map(lambda p, layer=layer: p[layer], stacked)
    block = nnx.merge(graphdef, params)
    attended = []
    inner = block.attention

    def record(u, c, state, opaque, inner=inner, attended=attended):
      out = inner(u, c, state, opaque)
      attended.append(out[0])
      return out

    block.attention = record
    x, _ = block(x, c, None)
    wanted = z[f"out/block_{layer}_attn"]
    assert relative_error(attended[0].reshape(wanted.shape), wanted) < 1e-5
    assert relative_error(x, z[f"out/block_{layer}"]) < 1e-5


@ATTENTIONS
@pytest.mark.parametrize("path", parity_files("arflow_recurrent*"))
def test_recurrent(path, load_parity, attention):
  z = load_parity(path)
  model, config = published_network(z.params())
  model = _served(model, attention)
  x, t = channels_last(z["in/x"]), z["in/t"]
  labels = jnp.asarray(z["in/y"])
  step = jax.jit(lambda x, t, state: model(x, t, labels, state))
  state = None
  for s in range(x.shape[1]):
    out, state = step(x[:, s : s + 1], t[:, s : s + 1], state)
    assert relative_error(channels_first(out[:, 0]), z["out/steps"][s]) < 1e-5
    for layer in range(config.depth):
      wanted = z[f"out/states_layer_{layer}"][s]
      assert relative_error(state[layer], wanted) < 1e-5
  out, whole = jax.jit(model)(x, t, labels)
  assert relative_error(channels_first(out), z["out/full_forward"]) < 1e-5
  assert relative_error(whole, state) < 1e-5


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_any_cut_of_a_sequence_gives_the_same(cuts):
  model = random_network(GOLDEN)
  key = jax.random.key(2)
  x = jax.random.normal(key, (2, 5, 8, 8, 4))
  t = jnp.sort(jax.random.uniform(key, (2, 5)))
  labels = jnp.array([1, 10])
  call = jax.jit(lambda x, t, state: model(x, t, labels, state))
  whole, last = call(x, t, None)
  state, outs, start = None, [], 0
  for length in cuts:
    part = slice(start, start + length)
    out, state = call(x[:, part], t[:, part], state)
    outs.append(out)
    start += length
  np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=2e-5)
  np.testing.assert_allclose(state, last, atol=2e-5)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("attention", [None, "pallas_tpu_interpret"])
def test_an_empty_state_looks_like_what_a_call_returns(attention, opaque):
  model = with_attention(ARFlow(GOLDEN, rngs=nnx.Rngs(0)), attention)
  call = lambda: model(
    jnp.ones((3, 1, 8, 8, 4)),
    jnp.ones((3, 1)),
    jnp.zeros(3, int),
    opaque_state=opaque,
  )
  _, returned = jax.eval_shape(call)
  state = model.init_state(3, opaque_state=opaque)
  assert (state.shape, state.dtype) == (returned.shape, returned.dtype)
  assert not state.any()


def test_fresh_network_answers_zero():
  model = ARFlow(GOLDEN, rngs=nnx.Rngs(0))
  x = jnp.ones((1, 2, 8, 8, 4))
  out, _ = model(x, jnp.ones((1, 2)), jnp.array([0]))
  assert not out.any()


def test_initial_values_follow_the_published_rules():
  model = ARFlow(GOLDEN, rngs=nnx.Rngs(0))
  q = model.blocks.attention.q_proj.kernel[...]
  bound = np.sqrt(6 / (128 + 128))
  assert q.shape == (2, 128, 2, 64)
  assert np.abs(q).max() <= bound
  np.testing.assert_allclose(q.std(), bound / np.sqrt(3), rtol=0.02)
  assert not np.allclose(q[0], q[1])
  patch = model.patch_embedding.kernel[...]
  np.testing.assert_allclose(
    patch.std(), np.sqrt(6 / (16 + 128)) / np.sqrt(3), rtol=0.05
  )
  np.testing.assert_allclose(model.label_embedding.table.std(), 0.02, rtol=0.1)
  np.testing.assert_allclose(
    model.time_embedding.fc2.kernel.std(), 0.02, rtol=0.05
  )


@pytest.mark.parametrize(("remat", "stacks"), [("none", 0), ("full", 1)])
def test_remat_reaches_the_blocks(remat, stacks):
  model = random_network(dataclasses.replace(GOLDEN, remat=remat))
  args = (jnp.ones((1, 2, 8, 8, 4)), jnp.ones((1, 2)), jnp.array([0]))
  assert str(jax.make_jaxpr(model)(*args)).count("prevent_cse") == stacks


def test_bfloat16_stays_close_and_returns_float32():
  model = random_network(GOLDEN)
  graphdef, state = nnx.split(model, nnx.Param)
  half = random_network(dataclasses.replace(GOLDEN, dtype="bfloat16"))
  graphdef, _ = nnx.split(half, nnx.Param)
  half = nnx.merge(graphdef, state)
  x = jax.random.normal(jax.random.key(3), (1, 3, 8, 8, 4))
  args = (x, jnp.full((1, 3), 0.5), jnp.array([0]))
  (out, memory), (wanted, _) = half(*args), model(*args)
  assert out.dtype == jnp.float32
  assert memory.dtype == jnp.float32
  assert relative_error(out, wanted) < 0.05


PUBLISHED_COUNTS = {
  "s": (34_643_744, 34_699_136, 34_920_704),
  "b": (137_467_424, 137_578_112, 138_020_864),
  "l": (483_301_408, 483_448_960, 484_039_168),
  "xl": (712_445_216, 712_546_688, 713_210_624),
}


@pytest.mark.parametrize("size", PUBLISHED_COUNTS)
@pytest.mark.parametrize("pixels", [128, 256])
def test_published_sizes(size, pixels):
  from arflow_jax import branches

  for patch, count in zip((2, 4, 8), PUBLISHED_COUNTS[size]):
    config = get_config(f"imagenet{pixels}-{size}{patch}")
    branch = branches.build(config)
    params = jax.eval_shape(branch.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert branch.item_shape == (5, pixels // 8, pixels // 8, 4)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"patch_size": 3}, "model.patch_size=3"),
    ({"patch_size": 0}, "model.patch_size=0"),
    ({"depth": 0}, "model.depth=0"),
    ({"attention": "triton"}, "model.attention='triton'"),
    ({"num_heads": 3}, "model.num_heads=3"),
    ({"mlp_ratio": 0.0}, "model.mlp_ratio=0.0"),
    ({"mlp_ratio": float("nan")}, "model.mlp_ratio=nan"),
    ({"mlp_ratio": float("inf")}, "model.mlp_ratio=inf"),
    ({"mlp_ratio": 1 / 256}, "model.mlp_ratio=0.0039"),
    ({"dtype": "float16"}, "model.dtype='float16'"),
    ({"remat": "some"}, "model.remat='some'"),
  ],
)
def test_bad_shapes_are_refused_by_name(change, named):
  with pytest.raises(ConfigError, match=named):
    make(ModelConfig, dataclasses.asdict(GOLDEN) | change, "model", RULES)


@pytest.mark.slow
def test_digits_learn_alike_through_the_kernel():
  """The shipped digits config: loss and every gradient of a real batch."""
  found = {}
  for attention in ("xla", "pallas_tpu_interpret"):
    config = get_config("digits")
    config.model.attention = attention
    branch = branches.build(config)
    params = branch.init(jax.random.key(0))
    rs = np.random.RandomState(0)  # away from the zeros of a fresh network
    params = jax.tree.map(
      lambda p, rs=rs: p + 0.05 * rs.standard_normal(p.shape).astype("f"),
      params,
    )
    batch = next(batches(config, 0))
    batch = jax.tree.map(jnp.asarray, batch)
    keys = jax.random.split(jax.random.key(1), config.batch_size)

    def mean(params, batch, keys, branch=branch):
      return jnp.mean(branch.loss(params, batch, keys))

    found[attention] = jax.jit(jax.value_and_grad(mean))(params, batch, keys)
  for wanted, ours in zip(*map(jax.tree.leaves, found.values())):
    assert relative_error(ours, wanted) < 1e-4
