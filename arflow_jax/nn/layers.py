"""The building blocks of every branch: projections, norms, embeddings, MLP.

Projections carry the names of their axes (`axes` in the variable's metadata:
`embed`, `heads`, `mlp`, ...); which mesh axis a name maps to is decided in
`arflow_jax.parallel`, never here.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from arflow_jax import values
from arflow_jax.errors import ConfigError
from arflow_jax.kernels import kept, shards
from arflow_jax.nn import stack

Initializer = nnx.initializers.Initializer

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()
normal = nnx.initializers.normal(0.02)


# Of the keys of `model` that every branch has.
RULES = {
  **dict.fromkeys(
    ("image_size", "channels", "patch_size", "width", "num_heads"), values.SIZE
  ),
  "num_classes": values.whole(1, 10_000_000),
  "mlp_ratio": values.real("(0, 1000]"),
  "dtype": values.one_of("float32", "bfloat16"),  # of matrix products
  "remat": values.one_of(*stack.REMAT),
}


def check_mlp_ratio(ratio: float, features: int) -> None:
  """Raises ConfigError unless a feed-forward of this ratio has features."""
  if features < 1:
    raise ConfigError(
      f"model.mlp_ratio={ratio} gives the feed-forward no hidden feature;"
      " published networks have 4"
    )


def linear(
  inputs: int | tuple[int, ...],
  outputs: int | tuple[int, ...],
  axes: tuple[str | None, ...],
  *,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
  use_bias: bool = True,
  init: Initializer = xavier,
  result: DTypeLike | None = None,
  kind: type[nnx.LinearGeneral] = nnx.LinearGeneral,
) -> nnx.LinearGeneral:
  """A projection with float32 parameters and products in `dtype`.

  Args:
    inputs: size of the last axis going in, or sizes of the last axes.
    outputs: size of the last axis coming out, or sizes of the last axes.
    axes: logical names of the kernel's axes, first those going in.
    dtype: type of the matrix product; float32 asks for full precision, which
      accelerators would otherwise round.
    rngs: source of the initial values.
    use_bias: whether a bias, zero at first, is added.
    init: initial values of the kernel, drawn as a matrix whatever its axes.
    result: type of the result where it is not `dtype`.
    kind: the class of the module.
  """
  ins = 1 if isinstance(inputs, int) else len(inputs)
  return kind(
    inputs,
    outputs,
    axis=tuple(range(-ins, 0)),
    use_bias=use_bias,
    dot_general=_matrix_product,
    dtype=dtype,
    precision="highest" if dtype == jnp.float32 else None,
    preferred_element_type=result,
    kernel_init=init,
    kernel_metadata={"axes": axes},
    bias_metadata={"axes": axes[ins:]},
    rngs=rngs,
  )


def _matrix_product(
  x: jax.Array, kernel: jax.Array, dimensions: Any, **kwargs: Any
) -> jax.Array:
  """The product of two matrices, whatever axes `x` and the kernel have.

  Reshapes are free. Of a product with more axes, XLA on a CPU transposes the
  gradient of the kernel by extra passes over memory, and rounds it otherwise.
  """
  (ins, _), _ = dimensions  # the last of x and the first of the kernel
  lead, outs = x.shape[: -len(ins)], kernel.shape[len(ins) :]
  features = math.prod(kernel.shape[: len(ins)])
  product = jax.lax.dot_general(
    x.reshape(math.prod(lead), features),
    kernel.reshape(features, math.prod(outs)),
    (((1,), (0,)), ((), ())),
    **kwargs,
  )
  return product.reshape(*lead, *outs)


class Modulation(nnx.LinearGeneral):
  """Shifts, scales and gates of a layer of a stack, from a condition.

  There is one row per image, for 6 E^2 float32 weights: where devices hold
  parts of them, it is the rows that are passed on, not the weights.
  """

  def __call__(self, c: Float[Array, "*lead E"]) -> Float[Array, "*lead F"]:
    def product(c):
      matrices = (((c.ndim - 1,), (0,)), ((), ()))
      kernel, bias = self.kernel[...], self.bias[...]
      return (
        self.dot_general(c, kernel, matrices, precision=self.precision) + bias
      )

    # One axis of rows: of several, XLA lays out the bias's gradient badly.
    rows = c.reshape(-1, c.shape[-1])
    how = stack.parts()
    out = how.product(product, rows) if how else product(rows)
    return out.reshape(*c.shape[:-1], -1)


def modulation(
  width: int, parts: int, *, rngs: nnx.Rngs, init: Initializer = xavier
) -> Modulation:
  """`parts` vectors of E features from one, float32.

  Args:
    width: E.
    parts: how many.
    rngs: source of the initial values.
    init: initial values of the kernel.
  """
  return linear(
    width,
    parts * width,
    (None, "modulation"),
    dtype=jnp.float32,
    rngs=rngs,
    init=init,
    kind=Modulation,
  )


def rms_norm(x: Float[Array, "*lead E"]) -> Float[Array, "*lead E"]:
  """Root-mean-square norm over the last axis, no gain, eps 1e-6, in float32."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)
  return (x32 * scale).astype(x.dtype)


def timestep_features(
  t: Float[Array, "*lead"], features: int, max_period: float = 10000.0
) -> Float[Array, "*lead F"]:
  """Sinusoidal features of times: cosines first, then sines (DiT).

  `t` is used as given: callers that count in thousandths scale it themselves.
  An odd number of features ends in one zero.
  """
  half = features // 2
  frequencies = jnp.exp(
    -math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half
  )
  angles = t[..., None].astype(jnp.float32) * frequencies
  out = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
  return jnp.pad(out, [(0, 0)] * t.ndim + [(0, features % 2)])


class TimeEmbedding(nnx.Module):
  """Times to vectors: sinusoidal features, then a two-layer SiLU MLP (DiT)."""

  features = 256

  def __init__(self, width: int, *, rngs: nnx.Rngs, init: Initializer = normal):
    kwargs = dict(dtype=jnp.float32, rngs=rngs, init=init)
    self.fc1 = linear(self.features, width, (None, "embed"), **kwargs)
    self.fc2 = linear(width, width, (None, "embed"), **kwargs)

  def __call__(self, t: Float[Array, "*lead"]) -> Float[Array, "*lead E"]:
    return self.fc2(jax.nn.silu(self.fc1(timestep_features(t, self.features))))


class LabelEmbedding(nnx.Module):
  """Classes to vectors; row `num_classes` is the null class."""

  def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
    self.table = nnx.Param(
      normal(rngs.params(), (num_classes + 1, width), jnp.float32),
      axes=(None, "embed"),
    )

  def __call__(self, labels: Int[Array, "*lead"]) -> Float[Array, "*lead E"]:
    return jnp.take(self.table[...], labels, axis=0)


@jax.custom_jvp
def _made(x: jax.Array) -> jax.Array:
  """`x`, made by itself: XLA for TPUs would make it inside the next product.

  That takes 1.1 times the cycles that it estimates for both.
  """
  return jax.lax.optimization_barrier(x) if shards.platform() == "tpu" else x


@_made.defjvp
def _(primals, tangents):
  # Gradients pass freely: the sum for a bias belongs to what makes them.
  return _made(*primals), tangents[0]


class FeedForward(nnx.Module):
  """Two projections with a tanh-form GELU between."""

  def __init__(
    self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.fc1 = linear(width, hidden, ("embed", "mlp"), **kwargs)
    self.fc2 = linear(hidden, width, ("mlp", "embed"), **kwargs)

  def __call__(self, x: Float[Array, "*lead E"]) -> Float[Array, "*lead E"]:
    hidden = _made(self.fc1(x))
    out = self.fc2(jax.nn.gelu(hidden, approximate=True))
    return kept.keep(out, kept.FEED_FORWARD)
