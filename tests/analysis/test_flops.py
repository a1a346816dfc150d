"""FLOP counts with known answers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from arflow_jax import branches
from arflow_jax.analysis import flops
from arflow_jax.kernels.hybrid_attention import cases, hybrid_attention
from arflow_jax.kernels.hybrid_attention.cases import SMALL
from configs.arflow import get_config
from tests.kernels.hybrid_attention import float64

A = jax.ShapeDtypeStruct((3, 4), jnp.float32)
B = jax.ShapeDtypeStruct((4, 5), jnp.float32)


def test_products_loops_and_branches():
  assert flops.count(jnp.matmul, A, B) == 2 * 3 * 4 * 5
  square = jax.ShapeDtypeStruct((4, 4), jnp.float32)

  def loop(m):
    return jax.lax.scan(
      lambda c, _: (jax.jit(lambda c: c @ m)(c), None), m, length=7
    )

  assert flops.count(lambda m: loop(m)[0], square) == 7 * 2 * 4**3

  def choose(m):
    return jax.lax.cond(m[0, 0] > 0, lambda m: m @ m, lambda m: (m @ m).T, m)

  assert flops.count(choose, square) == 2 * 4**3
  gradient = jax.grad(jax.checkpoint(lambda m: jnp.sum(jnp.sin(m @ m) @ m)))
  assert flops.count(gradient, square) > 4 * 2 * 4**3


def test_convolution():
  image = jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32)
  kernel = jax.ShapeDtypeStruct((5, 3, 3, 3), jnp.float32)
  convolve = lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID")
  assert flops.count(convolve, image, kernel) == 2 * 5 * 6 * 6 * 3 * 3 * 3


def test_a_loop_of_unknown_length_is_refused():
  square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  loop = lambda m: jax.lax.while_loop(lambda m: m[0, 0] < 1, lambda m: m @ m, m)
  with pytest.raises(ValueError, match="while"):
    flops.count(loop, square)


def test_branches_of_different_cost_are_refused():
  square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  choose = lambda m: jax.lax.cond(m[0, 0] > 0, lambda m: m @ m, lambda m: m, m)
  with pytest.raises(ValueError, match="cond"):
    flops.count(choose, square)


def _per_image(config):
  """The formula in the docstring of `ARFlow`."""
  tokens, width, head = (
    config.side**2,
    config.width,
    config.width // config.num_heads,
  )
  products = (10 + 4 * config.mlp_ratio) * width**2
  block = tokens * (products + 4 * width * (tokens + head)) + 12 * width**2
  return config.depth * block


@pytest.mark.parametrize(
  ("variant", "ratio"),
  [("imagenet128-s2", 4.0), ("imagenet128-s2", 2.5), ("imagenet256-b2", 4.0)],
)
def test_training_costs_what_the_formula_says(variant, ratio):
  config = get_config(variant)
  config.model.mlp_ratio = ratio
  branch = branches.build(config)
  params = jax.eval_shape(branch.init, jax.random.key(0))
  batch, images = 4, 5
  inputs = {
    "images": jax.ShapeDtypeStruct((batch, *branch.item_shape), jnp.float32),
    "labels": jax.ShapeDtypeStruct((batch,), jnp.int32),
  }
  keys = jax.random.split(jax.random.key(0), batch)
  counted = flops.count(branch.loss, params, inputs, keys)
  wanted = batch * images * _per_image(branch.config)
  assert abs(counted / wanted - 1) < 0.02


@pytest.mark.parametrize(
  ("changes", "calls"),
  [
    ({"guidance": 1.0}, 20),
    ({"guidance": 1.5}, 40),
    # 20 times from 0 to 0.96: six of them lie in the interval.
    ({"guidance": 1.5, "guidance_low": 0.3, "guidance_high": 0.6}, 26),
    ({"guidance": 1.0, "last_step": "none"}, 19),
    ({"guidance": 1.0, "method": "sde-heun"}, 39),
    ({"guidance": 1.5, "method": "ode-rk4"}, 160),
  ],
)
def test_sampling_costs_its_network_calls(changes, calls):
  """Guidance outside its interval adds nothing to the program."""
  config = get_config("imagenet128-s2").unlock()
  config.sample.update({"num_steps": 20} | changes)
  branch = branches.build(config)
  settings = branch.settings(config.sample)
  params = jax.eval_shape(branch.init, jax.random.key(0))
  keys = jax.random.split(jax.random.key(0), 3)
  counted = flops.count(
    lambda *args: branch.sample(*args, settings), params, keys, jnp.arange(3)
  )
  assert abs(counted / (3 * calls * _per_image(branch.config)) - 1) < 0.02


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1)])
def test_kernels_count_what_their_xla_form_counts(sizes):
  """With norms and gate, on one device and in shards."""
  case = SMALL[0]
  given = float64.inputs(case)
  names = ("q", "k", "v", "log_gate", "output_gate")
  given = {name: jnp.asarray(given[name]) for name in names}
  wanted = cases.flops(case, backward=False)
  triangle = 2 * case.batch * case.images * case.heads * case.tokens**2
  mesh = AbstractMesh(sizes, ("data", "fsdp"), (AxisType.Auto,) * 2)
  for name in ("xla", "pallas_tpu_interpret"):

    def attend(given, name=name):
      return hybrid_attention(
        **given, num_chunks=case.images, normalize=True, implementation=name
      )

    with jax.sharding.use_abstract_mesh(mesh):
      assert flops.count(attend, given) == wanted + triangle
      in_shards = "shard_map" in str(jax.make_jaxpr(attend)(given))
    assert in_shards == (sizes == (2, 1))


def test_shards_count_on_every_device():
  mesh = AbstractMesh((2, 3), ("x", "y"), (AxisType.Auto,) * 2)
  square = jax.ShapeDtypeStruct((6, 4, 4), jnp.float32)
  spec = PartitionSpec(("x", "y"))

  def shards(m):
    inner = lambda m: m @ m
    return jax.shard_map(inner, mesh=mesh, in_specs=spec, out_specs=spec)(m)

  assert flops.count(shards, square) == 6 * 2 * 4**3
