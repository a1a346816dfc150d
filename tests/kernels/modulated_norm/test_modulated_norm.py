"""Layer norm and modulation: every form against float64, also on a mesh."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from arflow_jax.errors import ConfigError
from arflow_jax.kernels.modulated_norm import api, modulated_norm

SHAPE = (2, 3, 32, 128)
ROWS = (2, 3, 128)


def _inputs():
  draw = np.random.default_rng(0).standard_normal
  x = 3 * draw(SHAPE) + 5 * draw((*SHAPE[:3], 1))  # far from a mean of zero
  weights = [draw(SHAPE), draw(SHAPE)]
  return [x, draw(ROWS), draw(ROWS)], weights


def _wanted(inputs, weights):
  """Outputs and gradients, by formulas of their own, in float64."""
  x, shift, scale = inputs
  d_stream, d_out = weights
  gain = 1 + scale[:, :, None]
  factor = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  unit = (x - x.mean(-1, keepdims=True)) * factor
  d_unit = d_out * gain
  d_unit = d_unit - d_unit.mean(-1, keepdims=True)
  d_unit -= unit * (d_unit * unit).mean(-1, keepdims=True)
  gradients = [
    d_stream + factor * d_unit,
    d_out.sum(2),
    (d_out * unit).sum(2),
  ]
  return unit * gain + shift[:, :, None], gradients


def _found(name, dtype=jnp.float32):
  inputs, weights = _inputs()

  def loss(*inputs):
    x, out = modulated_norm(*inputs, dtype=dtype, implementation=name)
    d_stream, d_out = map(jnp.float32, weights)
    return jnp.sum(x * d_stream) + jnp.sum(out * d_out), out

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  (_, out), gradients = run(*map(jnp.float32, inputs))
  return out, gradients


@pytest.mark.parametrize("name", ["xla", "pallas_tpu_interpret"])
@pytest.mark.parametrize(
  ("dtype", "close"), [("float32", 2e-5), ("bfloat16", 2e-2)]
)
def test_every_form_gives_what_the_equations_give(name, dtype, close):
  out, gradients = _found(name, jnp.dtype(dtype))
  assert out.dtype == dtype
  wanted, wanted_gradients = _wanted(*_inputs())
  for ours, theirs in zip([out, *gradients], [wanted, *wanted_gradients]):
    error = np.abs(np.float64(ours) - theirs).max()
    assert error < close * np.abs(theirs).max()


@pytest.mark.parametrize(("tokens", "programs"), [(32, 1), (512, 2), (272, 17)])
def test_an_image_of_many_tokens_is_cut(tokens, programs):
  grid, _, _ = api.pallas_tpu._blocks((1, 2, tokens, 128))
  assert grid == (1, 2, programs)


def test_sums_over_the_cuts_of_an_image(monkeypatch):
  whole = _found("pallas_tpu_interpret")[1]
  monkeypatch.setattr(api.pallas_tpu, "_TOKENS", 16)
  cut = _found("pallas_tpu_interpret")[1]
  for a, b in zip(whole, cut):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def _lowered(mesh, width=128):
  device = AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
  mesh = AbstractMesh(*mesh, abstract_device=device)
  shape = (*SHAPE[:3], width)
  args = [jax.ShapeDtypeStruct(shape, jnp.float32)]
  args += [jax.ShapeDtypeStruct((*shape[:2], width), jnp.float32)] * 2
  with jax.sharding.use_abstract_mesh(mesh):
    run = jax.jit(lambda *args: modulated_norm(*args, dtype=jnp.bfloat16))
    return str(jax.export.export(run, platforms=["tpu"])(*args).mlir_module())


@pytest.mark.parametrize(
  ("mesh", "width", "kernel"),
  [
    (((1,), ("data",)), 128, True),
    (((2, 2), ("data", "tensor")), 128, True),  # the same on both of `tensor`
    (((4,), ("data",)), 128, False),  # more devices than sequences
    (((1,), ("data",)), 96, False),
  ],
)
def test_the_kernel_serves_where_it_can(mesh, width, kernel):
  assert ("tpu_custom_call" in _lowered(mesh, width)) == kernel


@pytest.mark.parametrize(
  ("name", "reason"),
  [("pallas", "unknown; choose from xla"), ("pallas_tpu", "it needs a TPU")],
)
def test_a_name_that_cannot_serve_is_refused(name, reason):
  with pytest.raises(ConfigError, match=reason):
    _found(name)
