"""The FlowAR network against golden and reference values, and its promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arflow_jax import branches
from arflow_jax.config import make
from arflow_jax.errors import ConfigError
from arflow_jax.flowar import objective
from arflow_jax.flowar.network import RULES, FlowAR, ModelConfig
from configs.flowar import get_config
from tests.conftest import channels_last, parity_files, relative_error
from tests.flowar.helpers import (
  SCALES,
  golden_network,
  head_of,
  published_network,
  published_weights,
  random_network,
)

TINY = ModelConfig(8, 3, 1, (1, 2, 4, 8), 32, 2, 1, 2, 64, 2, False, 10)


def _inputs(network, latents):
  pyramid = network.config.pyramid
  targets = pyramid.targets(latents)
  return [pyramid.next_input(y, i + 1) for i, y in enumerate(targets[:-1])]


GOLDEN = {
  False: dict(
    levels=[0.113188, 0.656081],
    loss=5.511141,
    scales=[3.377622, 3.603033, 3.335602, 3.533573, 4.349783],
    first=[0.48492, 0.41720, 1.50634, 0.63090, -1.08723, 0.42996],
    std=1.11926,
    scale4=[-0.51039, 1.25861, -2.86675, -0.61122, -2.54986, -0.77898],
    scale16=[-3.78264, -0.69304, -0.63034, 0.83577, -0.74641, -1.23189],
  ),
  True: dict(
    levels=[0.636804, 0.422172],
    loss=5.176225,
    scales=[2.581023, 2.935447, 3.263728, 3.449628, 4.053886],
    first=[0.35096, 0.29182, 1.50886, 0.54159, -1.26116, 0.39819],
    std=1.11711,
    scale4=[-0.29889, 1.40175, -2.36141, 0.00885, -1.03109, 0.14115],
    scale16=[0.65629, 1.54643, -0.33618, 0.83936, 0.94559, -0.38236],
  ),
}


@pytest.mark.parametrize(
  "cross", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_golden_training(cross):
  wanted = GOLDEN[cross]
  rs = np.random.RandomState(1234)
  network = golden_network(rs, cross)
  latents = channels_last(rs.standard_normal((2, 16, 16, 16)).astype("float32"))
  labels = jnp.array([1, 1000])
  levels = rs.uniform(size=(5, 2)).astype("float32")
  np.testing.assert_allclose(levels[0], wanted["levels"], atol=1e-6)
  noise = [rs.standard_normal((2, s * s, 16)).astype("float32") for s in SCALES]
  draws = objective.Draws(
    jnp.asarray(levels.T), jnp.concatenate(noise, axis=1), None
  )

  @jax.jit
  def run(latents):
    z, _ = network.conditions(labels, _inputs(network, latents))
    losses = objective.scale_losses(network, latents, labels, draws)
    total = objective.loss(network, latents, labels, draws)
    pyramid = network.config.pyramid
    outputs = []
    begin = 0
    for i, (s, y) in enumerate(zip(SCALES, pyramid.targets(latents))):
      data, tau = pyramid.tokens(y), draws.levels[:, i, None, None]
      part = z[:, begin : begin + s * s]
      begin += s * s
      x = (1 - tau) * data + tau * noise[i]
      integers = objective.integer_levels(draws.levels[:, i : i + 1])
      context = network.head.context(part, (s,))
      outputs.append(network.head(x, integers, context, (s,)))
    return z, losses, total, outputs

  z, losses, total, outputs = run(latents)
  np.testing.assert_allclose(losses.mean(0), wanted["scales"], rtol=1e-4)
  np.testing.assert_allclose(total.mean(), wanted["loss"], rtol=1e-4)
  np.testing.assert_allclose(z[0, 0, :6], wanted["first"], atol=1e-4)
  np.testing.assert_allclose(z.std(), wanted["std"], atol=1e-4)
  out4, out16 = outputs[2][0, 5, :6], outputs[4][1, 255, :6]
  np.testing.assert_allclose(out4, wanted["scale4"], atol=2e-4)
  np.testing.assert_allclose(out16, wanted["scale16"], atol=2e-4)
  if not cross:
    last = [-0.58740, -0.58142, -1.04547, 0.76221, -2.02461, -0.13226]
    np.testing.assert_allclose(z[1, 340, :6], last, atol=1e-4)


def _published(z):
  """The network of a reference file; no weight tells the patch size."""
  patch_size = z.meta["constructor"]["patch_size"]
  return published_network(z.params(), patch_size=patch_size)


def _reference_draws(z, scales, prefix="in/"):
  levels = jnp.stack([z[f"{prefix}time/{s}"] for s in scales], axis=1)
  noise = [z[f"{prefix}noise/{s}"] for s in scales]
  return objective.Draws(levels, jnp.concatenate(noise, axis=1), None)


@pytest.mark.parametrize("path", parity_files("flowar_train_forward*"))
def test_train_forward_and_gradients(path, load_parity):
  z = load_parity(path)
  network, config = _published(z)
  latents, labels = channels_last(z["in/latents"]), jnp.asarray(z["in/labels"])
  draws = _reference_draws(z, config.scales)
  pyramid = config.pyramid
  for s, y, up in zip(
    config.scales, pyramid.targets(latents), [None, *_inputs(network, latents)]
  ):
    wanted = channels_last(z[f"out/gt_latents/{s}"])
    assert relative_error(y, wanted) < 1e-5
    if up is not None:
      assert relative_error(up, channels_last(z[f"out/x_input/{s}"])) < 1e-5

  graphdef, state = nnx.split(network, nnx.Param)
  params = nnx.to_pure_dict(state)
  merge = lambda params: nnx.merge(graphdef, nnx.State(params))

  def mean_loss(params, labels, draws):
    return objective.loss(merge(params), latents, labels, draws).mean()

  step = jax.jit(jax.value_and_grad(mean_loss))
  total, grads = step(params, labels, draws)
  assert relative_error(total, z["out/loss"]) < 1e-5
  losses = jax.jit(
    lambda p: objective.scale_losses(merge(p), latents, labels, draws)
  )(params)
  for i, s in enumerate(config.scales):
    wanted = z[f"out/scale_loss_per_sample/{s}"]
    assert relative_error(losses[:, i], wanted) < 2e-5
  assert relative_error(losses.mean(0), z["out/scale_loss"]) < 2e-5
  found, _ = jax.jit(network.conditions)(labels, _inputs(network, latents))
  assert relative_error(found, z["out/z"]) < 1e-5

  ours = published_weights(merge(grads))
  for name, rows in z.under("out/grad_rows/").items():
    assert relative_error(ours[name][: len(rows)], rows) < 1e-4, name
  for name, wanted in z.under("out/grad/").items():
    assert relative_error(ours[name], wanted) < 1e-4, name
  for name, wanted in z.under("out/grad_norm/").items():
    assert relative_error(np.linalg.norm(ours[name]), wanted) < 1e-4, name

  # The file holds no rate of dropping: it lies between two of its draws.
  chances = z["in/label_drop_uniform"]
  draws = _reference_draws(z, config.scales, "in/label_drop/")
  totals = [
    step(params, jnp.where(chances < rate, config.num_classes, labels), draws)
    for rate in (*chances, 1.0)
  ]
  wanted = z["out/loss_label_drop"]
  assert min(relative_error(total, wanted) for total, _ in totals) < 1e-5


@pytest.mark.parametrize("path", parity_files("flowar_train_forward*"))
def test_intermediate_values(path, load_parity):
  z = load_parity(path)
  network, config = _published(z)
  latents, labels = channels_last(z["in/latents"]), jnp.asarray(z["in/labels"])
  tokens, _ = network._tokens(labels, _inputs(network, latents), 0)
  assert relative_error(tokens, z["out/tokens_in"]) < 1e-5
  draws = _reference_draws(z, config.scales)
  conditions, begin = jnp.asarray(z["out/z"]), 0
  targets = config.pyramid.targets(latents)
  for i, (s, y) in enumerate(zip(config.scales, targets)):
    part = conditions[:, begin : begin + s * s]
    begin += s * s
    tau = draws.levels[:, i, None, None]
    x = (1 - tau) * config.pyramid.tokens(y) + tau * z[f"in/noise/{s}"]
    integers = objective.integer_levels(draws.levels[:, i : i + 1])
    out = network.head(x, integers, network.head.context(part, (s,)), (s,))
    assert relative_error(out, z[f"out/flow_output/{s}"]) < 5e-5


@pytest.mark.parametrize("path", parity_files("flowar_flow_network*"))
def test_head_alone(path, load_parity):
  z = load_parity(path)
  for network in z.cases("networks"):
    head = head_of(z, network)
    name, side = f"n{network['index']}", (network["grid"],)
    levels = objective.integer_levels(z[f"in/{name}/t"])[:, None]
    out = jax.jit(
      lambda x, c, head=head, side=side, levels=levels: head(
        x, levels, head.context(c, side), side
      )
    )(z[f"in/{name}/x"], z[f"in/{name}/z"])
    assert relative_error(out, z[f"out/{name}/forward"]) < 5e-5


@pytest.mark.parametrize("path", parity_files("tables*"))
def test_integer_levels(path, load_parity):
  z = load_parity(path)
  found = objective.integer_levels(z["in/time_truncation/t"])
  np.testing.assert_array_equal(found, z["out/time_truncation/int"])


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (3, 1)])
def test_scales_one_by_one_equal_the_masked_pass(cuts):
  network = random_network(TINY)
  latents = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  labels = jnp.array([3, 10])
  inputs = _inputs(network, latents)
  whole, cache = jax.jit(network.conditions)(labels, inputs)
  first, state, parts = 0, None, []
  for count in cuts:
    given = inputs[max(first - 1, 0) : first + count - 1]
    step = jax.jit(functools.partial(network.conditions, first=first))
    z, state = step(labels, given, state)
    parts.append(z)
    first += count
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state, cache
  )


def test_a_cache_that_does_not_fit_is_refused():
  network, labels = random_network(TINY), jnp.array([3])
  with pytest.raises(ValueError, match="first=1 needs the cache"):
    network.conditions(labels, [jnp.zeros((1, 2, 2, 3))], first=1)
  _, cache = network.conditions(labels, [])
  with pytest.raises(ValueError, match="first=0 needs no cache"):
    network.conditions(labels, [], cache)


def test_later_scales_never_reach_earlier_ones():
  network = random_network(TINY)
  labels = jnp.array([3])
  latents = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  inputs = _inputs(network, latents)
  run = jax.jit(network.conditions)
  a, _ = run(labels, inputs)
  b, _ = run(labels, [*inputs[:2], inputs[2] + 1])
  np.testing.assert_array_equal(a[:, :21], b[:, :21])
  assert np.abs(a[:, 21:] - b[:, 21:]).min() > 0


@pytest.mark.parametrize(
  ("variant", "count"),
  [("s", 171_718_072), ("l", 586_862_912), ("h", 1_913_316_880)],
)
def test_published_sizes(variant, count):
  branch = branches.build(get_config("imagenet256-" + variant))
  params = jax.eval_shape(branch.init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_initial_values_follow_the_published_rules():
  """Xavier everywhere, the head's output and modulations too."""
  config = ModelConfig(8, 4, 1, (4, 8), 256, 2, 2, 4, 128, 2, True, 10)
  network = jax.jit(lambda: nnx.split(FlowAR(config, rngs=nnx.Rngs(0))))()
  state = published_weights(nnx.merge(*network))
  for name, value in state.items():
    if name == "mask" or name.endswith("freqs"):
      continue
    if "pos_embed" in name or name == "class_emb.weight":
      np.testing.assert_allclose(value.std(), 0.02, rtol=0.1)
    elif value.ndim == 2:
      limit = np.sqrt(6 / sum(value.shape))
      assert 0.97 * limit < np.abs(value).max() <= limit, name
    elif name.endswith(".weight"):
      np.testing.assert_array_equal(value, 1)
    else:
      np.testing.assert_array_equal(value, 0)


@pytest.mark.parametrize(("remat", "stacks"), [("none", 0), ("full", 3)])
def test_remat_reaches_both_halves_and_the_head(remat, stacks):
  network = random_network(dataclasses.replace(TINY, remat=remat))
  x = jnp.ones((2, 8, 8, 3))
  keys = jax.random.split(jax.random.key(0), 2)

  def loss(x):
    draws = objective.draw(keys, network.config)
    return objective.loss(network, x, jnp.array([0, 2]), draws)

  assert str(jax.make_jaxpr(loss)(x)).count("prevent_cse") == stacks


def test_bfloat16_stays_close_and_returns_float32():
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  labels = jnp.array([3, 10])

  def run(dtype):
    network = random_network(dataclasses.replace(TINY, dtype=dtype))
    return jax.jit(functools.partial(answers, network))()

  def answers(network):
    z, _ = network.conditions(labels, _inputs(network, x))
    context = network.head.context(z[:, -64:], (8,))
    levels = jnp.full((2, 1), 500.0)
    tokens = network.config.pyramid.tokens(x)
    return z, network.head(tokens, levels, context, (8,))

  for ours, exact in zip(run("bfloat16"), run("float32")):
    assert ours.dtype == jnp.float32
    assert relative_error(ours, exact) < 0.05


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"scales": (1, 3, 8)}, "model.scales"),
    ({"scales": (1, 2, 4)}, "end at a side of 4"),
    ({"patch_size": 2}, "end at a side of 16"),
    ({"num_heads": 3}, "model.width=32"),
    ({"num_heads": 16}, "model.width=32"),
    ({"head_width": 96}, "model.head_width=96"),
    ({"mlp_ratio": -4.0}, "model.mlp_ratio=-4.0"),
    ({"mlp_ratio": float("nan")}, "model.mlp_ratio=nan"),
    ({"mlp_ratio": 1 / 32}, "model.mlp_ratio=0.03125"),
    ({"encoder_depth": 0}, "model.encoder_depth=0"),
    ({"rope_stretch": 0.0}, "model.rope_stretch=0.0"),
    ({"dropout": 1.0}, "model.dropout=1.0"),
    ({"dtype": "float16"}, "model.dtype='float16'"),
    ({"remat": "some"}, "model.remat='some'"),
  ],
)
def test_bad_shapes_are_refused_by_name(change, named):
  with pytest.raises(ConfigError, match=named):
    make(ModelConfig, dataclasses.asdict(TINY) | change, "model", RULES)
