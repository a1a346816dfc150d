"""What FlowAR's transformer and flow head share (FlowAR, arXiv 2412.15205)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from arflow_jax.kernels import kept
from arflow_jax.nn import layers


class Dropout:
  """Dropout whose draws belong to the item: one key for each row of a batch.

  Each call makes a fresh draw: its count is folded into the keys, so that one
  instance serves one pass through one block. Probabilities are multiples of
  2^-16, so that a draw costs half the random bits.

  Args:
    rate: probability that a value is dropped, in [0, 1).
    keys: one for each row.
  """

  def __init__(self, rate: float, keys: Key[Array, "B"]):
    self._rate, self._keys = min(round(rate * 65536), 65535), keys
    self._calls = 0

  def __call__(self, x: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
    site = self._calls
    self._calls += 1

    def keep(key):
      bits = jax.random.bits(
        jax.random.fold_in(key, site), x.shape[1:], jnp.uint16
      )
      return bits >= self._rate

    scale = 65536 / (65536 - self._rate)
    return jnp.where(jax.vmap(keep)(self._keys), x * scale, 0).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis with a learned gain, eps 1e-6."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones((width,)), axes=("embed",))

  def __call__(self, x: Float[Array, "*lead E"]) -> Float[Array, "*lead E"]:
    return layers.rms_norm(x) * self.scale[...].astype(x.dtype)


def hidden_features(width: int, mlp_ratio: float) -> int:
  """Features of each of the two that a gated feed-forward multiplies.

  Two thirds of the ratio, as published: three layers then hold about as much as
  two of a plain feed-forward.
  """
  return int(width * mlp_ratio * 2 / 3)


class GatedFeedForward(nnx.Module):
  """`fc2(GELU(gate x) * (value x))` with exact GELU."""

  def __init__(
    self, width: int, mlp_ratio: float, *, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    hidden = hidden_features(width, mlp_ratio)
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.gate = layers.linear(width, hidden, ("embed", "mlp"), **kwargs)
    self.value = layers.linear(width, hidden, ("embed", "mlp"), **kwargs)
    self.fc2 = layers.linear(hidden, width, ("mlp", "embed"), **kwargs)

  def __call__(
    self, x: Float[Array, "B n E"], dropout: Dropout | None = None
  ) -> Float[Array, "B n E"]:
    drop = dropout or (lambda x: x)
    hidden = jax.nn.gelu(self.gate(x), approximate=False) * self.value(x)
    return drop(kept.keep(self.fc2(drop(hidden)), kept.FEED_FORWARD))


def modulated(
  x: Float[Array, "B n E"],
  shift: Float[Array, "B #n E"],
  scale: Float[Array, "B #n E"],
  dtype: DTypeLike,
) -> Float[Array, "B n E"]:
  """`RMS(x) (1 + scale) + shift`, per image or (Spatial-adaLN) per token."""
  return (layers.rms_norm(x) * (1 + scale) + shift).astype(dtype)
