"""Layer norm and modulation in one pass over memory, forward and backward.

XLA makes four passes over the tokens forward and more backward. A program
takes some tokens of one image, a few rows at a time, so that they stay in
registers; the backward kernel computes the norm again and adds the gradient
that comes along the residual stream.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

EPSILON = 1e-6
_TOKENS = 256  # that one program takes, at most
_ROWS = 16  # that are computed at a time: a tile of bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def modulated_norm(dtype, interpret, x, shift, scale):
  """See `api.modulated_norm`; a number of tokens that 16 divides."""
  return x, _forward(dtype, interpret, x, shift, scale)


def _save(dtype, interpret, x, shift, scale):
  out = x, _forward(dtype, interpret, x, shift, scale)
  return out, (x, scale)


def _forward(dtype, interpret, x, shift, scale):
  grid, tokens, vector = _blocks(x.shape)
  return pl.pallas_call(
    _forward_kernel,
    grid=grid,
    in_specs=[tokens, vector, vector],
    out_specs=tokens,
    out_shape=jax.ShapeDtypeStruct(x.shape, dtype),
    cost_estimate=_cost(x, 8, 4 + dtype.itemsize),
    interpret=interpret,
    name="modulated_norm_forward",
  )(x, shift[:, :, None], scale[:, :, None])


def _backward(dtype, interpret, saved, cotangents):
  x, scale = saved
  dx, du = cotangents
  grid, tokens, vector = _blocks(x.shape)
  row = jax.ShapeDtypeStruct((*scale.shape[:2], 1, x.shape[-1]), jnp.float32)
  dx, d_shift, d_scale = pl.pallas_call(
    _backward_kernel,
    grid=grid,
    in_specs=[tokens, vector, tokens, tokens],
    out_specs=[tokens, vector, vector],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), row, row],
    input_output_aliases={3: 0},  # the residual stream's gradient, in place
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    cost_estimate=_cost(x, 16, 12 + dtype.itemsize),
    interpret=interpret,
    name="modulated_norm_backward",
  )(x, scale[:, :, None], du, dx)
  return dx, d_shift[:, :, 0], d_scale[:, :, 0]


modulated_norm.defvjp(_save, _backward)


def _blocks(shape):
  """The grid, and the blocks of tokens and of one row for each image."""
  batch, images, tokens, width = shape
  taken = next(n for n in range(_TOKENS, 0, -_ROWS) if tokens % n == 0)
  rows = pl.BlockSpec((1, 1, taken, width), lambda b, s, i: (b, s, i, 0))
  one = pl.BlockSpec((1, 1, 1, width), lambda b, s, i: (b, s, 0, 0))
  return (batch, images, tokens // taken), rows, one


def _cost(x, flops, size):
  return pl.CostEstimate(
    flops=flops * x.size, transcendentals=0, bytes_accessed=size * x.size
  )


def _parts(ref):
  return [pl.ds(begin, _ROWS) for begin in range(0, ref.shape[2], _ROWS)]


def _normed(x):
  """The norm of some rows, and the factor that made it."""
  x -= jnp.mean(x, axis=-1, keepdims=True)
  factor = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)
  return x * factor, factor


def _forward_kernel(x, shift, scale, out):
  gain, shift = 1 + scale[0, 0], shift[0, 0]
  for part in _parts(x):
    unit, _ = _normed(x[0, 0, part])
    out[0, 0, part] = (unit * gain + shift).astype(out.dtype)


def _backward_kernel(x, scale, du, d_stream, dx, d_shift, d_scale):
  gain = 1 + scale[0, 0]
  sums = [jnp.zeros((_ROWS, x.shape[3]), jnp.float32) for _ in range(2)]
  for part in _parts(x):
    unit, factor = _normed(x[0, 0, part])
    d_out = du[0, 0, part].astype(jnp.float32)
    sums = [sums[0] + d_out, sums[1] + d_out * unit]
    d_unit = d_out * gain
    mean = jnp.mean(d_unit, axis=-1, keepdims=True)
    along = jnp.mean(d_unit * unit, axis=-1, keepdims=True)
    own = factor * (d_unit - mean - unit * along)
    dx[0, 0, part] = d_stream[0, 0, part] + own

  @pl.when(pl.program_id(2) == 0)
  def _():
    d_shift[...] = jnp.zeros_like(d_shift)
    d_scale[...] = jnp.zeros_like(d_scale)

  d_shift[0, 0] += jnp.sum(sums[0], axis=0, keepdims=True)
  d_scale[0, 0] += jnp.sum(sums[1], axis=0, keepdims=True)
