"""FLOP counts with known answers."""

import jax
import jax.numpy as jnp
import pytest

from arflow_jax import branches
from arflow_jax.analysis import flops
from configs.arflow import get_config

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
    return jax.lax.cond(m[0, 0] > 0, lambda m: m @ m @ m, lambda m: m @ m, m)

  assert flops.count(choose, square) == 2 * 2 * 4**3
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


def test_arflow_forward_is_near_its_formula():
  """Per token 26 E^2 + 4 E (N + D) a block, and 12 E^2 a block per image."""
  config = get_config("imagenet128-s2")
  branch = branches.build(config)
  params = jax.eval_shape(branch.init, jax.random.key(0))
  batch, images, tokens, width, depth, head = 4, 5, 64, 384, 12, 64
  inputs = {
    "images": jax.ShapeDtypeStruct((batch, *branch.item_shape), jnp.float32),
    "labels": jax.ShapeDtypeStruct((batch,), jnp.int32),
  }
  keys = jax.random.split(jax.random.key(0), batch)
  counted = flops.count(branch.loss, params, inputs, keys)
  per_image = depth * (
    tokens * (26 * width**2 + 4 * width * (tokens + head)) + 12 * width**2
  )
  assert abs(counted / (batch * images * per_image) - 1) < 0.02
