"""Stacked layers against the same layers one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arflow_jax.nn import layers, stack

DEPTH, WIDTH = 3, 4


class Layer(nnx.Module):
  def __init__(self, *, rngs):
    self.fc = layers.linear(
      WIDTH, WIDTH, ("embed", "mlp"), dtype=jnp.float32, rngs=rngs
    )

  def __call__(self, x, bias):
    return jnp.sin(self.fc(x)) + bias, x.sum()


def _stacked():
  built = stack.build(lambda rngs: Layer(rngs=rngs), DEPTH, nnx.Rngs(params=0))
  return nnx.split(built)


def _layer(params, i):
  return jax.tree.map(lambda p: p[i], params)


def test_every_layer_draws_values_of_its_own_and_keeps_the_names_of_its_axes():
  _, params = _stacked()
  kernel = params["fc"]["kernel"]
  assert kernel.shape == (DEPTH, WIDTH, WIDTH)
  assert kernel.get_metadata()["axes"] == ("embed", "mlp")
  for i in range(DEPTH):
    # Each is drawn as if alone: the limit of its values is that of one layer.
    limit = np.sqrt(6 / (WIDTH + WIDTH))
    assert 0.5 * limit < np.abs(kernel[i]).max() <= limit
    assert not np.allclose(kernel[i], kernel[i - 1])


def test_parameters_can_pass_through_a_function_one_layer_at_a_time():
  """With the names of their axes; afterwards they are as they were."""
  graphdef, params = _stacked()
  seen = set()

  def double(names, array):
    seen.add((names, array.shape))
    return 2 * array

  def walked(params):
    layers = nnx.merge(graphdef, params)
    step = lambda layer, x, _: layer(x, 0.5)
    return stack.walk(layers, step, jnp.ones((2, WIDTH)))[0]

  before = walked(params)
  with stack.in_parts(stack.Parts(double, None)):
    doubled = walked(params)
  assert seen == {(("embed", "mlp"), (WIDTH, WIDTH)), (("mlp",), (WIDTH,))}
  wanted = walked(jax.tree.map(lambda p: 2 * p, params))
  np.testing.assert_array_equal(doubled, wanted)
  np.testing.assert_array_equal(walked(params), before)
  assert np.abs(doubled - before).max() > 0.01


@pytest.mark.parametrize("remat", stack.REMAT)
def test_a_walk_is_a_loop_over_the_layers(remat):
  graphdef, params = _stacked()
  x = jax.random.normal(jax.random.key(0), (2, WIDTH))
  biases = jax.random.normal(jax.random.key(1), (DEPTH, WIDTH))

  def walked(params):
    out, sums = stack.walk(
      nnx.merge(graphdef, params),
      lambda layer, x, bias: layer(x, bias),
      x,
      biases,
      remat=remat,
    )
    return jnp.sum(out**2), (out, sums)

  def looped(params):
    out, sums = x, []
    for i in range(DEPTH):
      layer = nnx.merge(graphdef, _layer(params, i))
      out, total = layer(out, biases[i])
      sums.append(total)
    return jnp.sum(out**2), (out, jnp.stack(sums))

  run = lambda f: jax.jit(jax.value_and_grad(f, has_aux=True))(params)
  ours, wanted = run(walked), run(looped)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    ours,
    wanted,
  )


@pytest.mark.parametrize(
  ("remat", "products"),
  # Forward and the two of the backward pass, and one more if computed again.
  [("none", 3), ("dots", 3), ("full", 4)],
)
def test_only_full_remat_makes_the_products_again(remat, products):
  graphdef, params = _stacked()

  def loss(params):
    layers = nnx.merge(graphdef, params)
    out, _ = stack.walk(
      layers,
      lambda layer, x, _: (jnp.sin(layer(x, 0.0)[0]), None),
      jnp.ones((2, WIDTH)),
      remat=remat,
    )
    return out.sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert text.count("dot_general") == products
  assert ("prevent_cse" in text) == (remat != "none")
