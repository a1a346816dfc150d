"""Stacked layers against the same layers one after another."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from arflow_jax.kernels.hybrid_attention import hybrid_attention
from arflow_jax.nn import attention, layers, stack

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
  [("none", 3), ("dots", 3), ("feed_forward", 4), ("full", 4)],
)
def test_without_dots_products_are_made_again(remat, products):
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


@pytest.mark.parametrize(
  ("remat", "forward"),
  [("none", 1), ("dots", 1), ("attention", 1), ("feed_forward", 2)],
)
def test_the_kernel_of_attention_runs_once_where_its_results_are_kept(
  remat, forward
):
  graphdef, params = _stacked()
  device = AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
  mesh = AbstractMesh((1,), ("data",), abstract_device=device)

  def attend(layer, x, _):
    q = jnp.tile(layer(x, 0.0)[0], (1, 1, 128 // WIDTH))
    out, _ = hybrid_attention(
      q,
      q,
      q,
      -jnp.abs(q[..., :2]),
      num_chunks=2,
      normalize=True,
      output_gate=q,
    )
    return out[..., :WIDTH], None

  def loss(params):
    layers = nnx.merge(graphdef, params)
    x = jnp.ones((1, 32, WIDTH))
    return stack.walk(layers, attend, x, remat=remat)[0].sum()

  with jax.sharding.use_abstract_mesh(mesh):
    closed = jax.make_jaxpr(jax.grad(loss))(params)
  counts = collections.Counter(_needed_kernels(closed.jaxpr))
  assert counts["hybrid_attention_forward"] == forward
  assert counts["hybrid_attention_backward"] == 1


def _needed_kernels(jaxpr):
  """Names of the kernels in a program; XLA leaves out what nothing needs."""
  needed = {id(v) for e in jaxpr.eqns for v in e.invars}
  needed |= {id(v) for v in jaxpr.outvars}
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      if needed.intersection(map(id, equation.outvars)):
        yield equation.params["name"]
      continue
    for value in equation.params.values():
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns"):
        yield from _needed_kernels(value)


@pytest.mark.parametrize("in_parts", [False, True])
def test_heads_and_their_features_are_one_axis_between_the_layers(in_parts):
  """The layer itself gets its parameters as it made them."""

  class Heads(nnx.Module):
    def __init__(self, rngs):
      kwargs = dict(dtype=jnp.float32, rngs=rngs)
      self.to = attention.to_heads(6, 3, 2, parts=2, **kwargs)
      self.back = attention.from_heads(3, 2, 6, **kwargs)

    def __call__(self, x):
      return self.back(self.to(x).sum(-3)), None

  built = stack.build(Heads, DEPTH, nnx.Rngs(params=0))
  graphdef, params = nnx.split(built)
  x, seen = jnp.ones((2, 6)), set()

  def whole(names, array):
    seen.add((names, array.shape))
    return array

  def walked(params):
    layers = nnx.merge(graphdef, params)
    return stack.walk(layers, lambda layer, x, _: layer(x), x)[0]

  with stack.in_parts(stack.Parts(whole, None) if in_parts else None):
    text = str(jax.make_jaxpr(walked)(params))
    found = walked(params)
  for shape in (f"{DEPTH},6,2,6", f"{DEPTH},2,6", f"{DEPTH},6,6"):
    assert f"f32[{shape}]" in text
  wanted = x
  for i in range(DEPTH):
    wanted, _ = nnx.merge(graphdef, _layer(params, i))(wanted)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  if in_parts:
    assert seen == {
      (("embed", None, "heads"), (6, 2, 6)),
      ((None, "heads"), (2, 6)),
      (("heads", "embed"), (6, 6)),
      (("embed",), (6,)),
    }
