"""The ARFlow network (arXiv 2501.16085, section 3; sizes as published).

A latent flow transformer over a *sequence* of images of one class, noisiest
first. Each block has hybrid attention (softmax inside an image, a gated linear
state across images) and a feed-forward layer, both modulated by adaLN-Zero from
the class and the image's own time. Training feeds whole sequences; sampling
feeds one image per call and carries the state of every layer along: the same
code, with the state passed in and returned.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from arflow_jax import values
from arflow_jax.errors import ConfigError
from arflow_jax.kernels import hybrid_attention
from arflow_jax.kernels.modulated_norm import modulated_norm
from arflow_jax.nn import attention, layers, patches, stack

RULES = layers.RULES | {
  "depth": values.whole(1, 10_000),
  "learn_sigma": values.switch,
  "attention": values.optional(values.text),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that fixes the parameters of an `ARFlow` and how it computes.

  Attributes:
    image_size: side of the (latent) images.
    channels: C, channels of the (latent) images.
    patch_size: side of a patch; divides `image_size`.
    width: E, features of a token; a multiple of 4 and of `num_heads`.
    depth: number of blocks.
    num_heads: H, heads of the hybrid attention.
    num_classes: classes; label `num_classes` is the null class.
    mlp_ratio: hidden features of the feed-forward layers over `width`, R.
    learn_sigma: the published networks compute 2C output channels and drop the
      last C; True keeps their parameter count.
    dtype: type of the matrix products, "float32" or "bfloat16".
    remat: what the backward pass recomputes, a name in `nn.stack.REMAT`.
    attention: implementation of the hybrid attention, or None for the best.
  """

  image_size: int
  channels: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  num_classes: int
  mlp_ratio: float = 4.0
  learn_sigma: bool = True
  dtype: str = "float32"
  remat: str = "dots"
  attention: str | None = None

  def __post_init__(self):
    if self.image_size % self.patch_size:
      raise ConfigError(
        f"model.patch_size={self.patch_size} does not divide the image size"
        f" {self.image_size}; choose a divisor"
      )
    if self.side > 256:
      raise ConfigError(
        f"model.image_size={self.image_size} makes {self.side} x {self.side}"
        f" patches with model.patch_size={self.patch_size}, more than 256 x 256"
      )
    if self.width % self.num_heads or self.width % 4:
      raise ConfigError(
        f"model.width={self.width} must be a multiple of 4 and of"
        f" model.num_heads={self.num_heads}"
      )
    layers.check_mlp_ratio(
      self.mlp_ratio, hidden_features(self.width, self.mlp_ratio)
    )
    if self.attention is not None:
      reason = hybrid_attention.misfit(
        self.attention,
        tokens=self.side**2,
        heads=self.num_heads,
        head=self.width // self.num_heads,
        dtype=self.dtype,
      )
      if reason:
        raise ConfigError(
          f"model.attention={self.attention!r}: {reason}; leave it out for the"
          " best that can serve"
        )

  @property
  def side(self) -> int:
    """Patches along one side of an image; N is its square."""
    return self.image_size // self.patch_size


def hidden_features(width: int, mlp_ratio: float) -> int:
  """Features between the two layers of a feed-forward, as published."""
  return int(width * mlp_ratio)


State = Float[Array, "L B ..."]  # [L, B, H, D, D] unless it is opaque


class HybridAttention(nnx.Module):
  """Attention sub-layer: projections, gates and norms around the operator."""

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.config = config
    kwargs = dict(use_bias=False, dtype=dtype, rngs=rngs)
    width, heads = config.width, config.num_heads
    size = width // heads
    self.q_proj = attention.to_heads(width, heads, size, **kwargs)
    self.k_proj = attention.to_heads(width, heads, size, **kwargs)
    self.v_proj = attention.to_heads(width, heads, size, **kwargs)
    self.gate_proj = attention.to_heads(width, heads, size, **kwargs)
    self.decay_proj = layers.linear(
      width, heads, ("embed", "heads"), result=jnp.float32, **kwargs
    )
    self.out_proj = attention.from_heads(heads, size, width, **kwargs)

  def __call__(
    self,
    u: Float[Array, "B S N E"],
    c: Float[Array, "B S E"],
    state: Float[Array, "B ..."] | None,
    opaque_state: bool = False,
  ) -> tuple[Float[Array, "B S N E"], Float[Array, "B ..."]]:
    """Attends inside each image and reads, then updates, the layer's state.

    Args:
      u: modulated tokens.
      c: the raw condition of each image; it biases the decay of the state.
      state: memory of the images before these; None stands for an empty one.
      opaque_state: see `hybrid_attention`.
    """
    batch, images, tokens, width = u.shape
    # The operator takes the heads packed, in the order they have here.
    q, k, v, output_gate = (
      proj(u).reshape(batch, images * tokens, width)
      for proj in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
    )
    # (u + c) W as two products: c has one row per image, not one per token.
    logits = self.decay_proj(u) + self.decay_proj(c)[:, :, None]
    log_gate = jax.nn.log_sigmoid(logits) / 16
    out, state = hybrid_attention.hybrid_attention(
      q,
      k,
      v,
      log_gate.reshape(batch, images * tokens, -1),
      state,
      num_chunks=images,
      normalize=True,  # over the whole width, before the head split
      output_gate=output_gate,
      opaque_state=opaque_state,
      implementation=self.config.attention,
    )
    heads = (self.config.num_heads, width // self.config.num_heads)
    return self.out_proj(out.reshape(*u.shape[:3], *heads)), state


class Block(nnx.Module):
  """adaLN-Zero transformer block with hybrid attention."""

  def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    self.modulation = layers.modulation(
      config.width, 6, rngs=rngs, init=layers.zeros
    )
    self.attention = HybridAttention(config, dtype=dtype, rngs=rngs)
    self._dtype = dtype
    hidden = hidden_features(config.width, config.mlp_ratio)
    self.mlp = layers.FeedForward(config.width, hidden, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B S N E"],
    c: Float[Array, "B S E"],
    state: Float[Array, "B ..."] | None,
    opaque_state: bool = False,
  ) -> tuple[Float[Array, "B S N E"], Float[Array, "B ..."]]:
    mod = jnp.split(self.modulation(jax.nn.silu(c)), 6, axis=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = mod
    x, u = modulated_norm(x, shift1, scale1, dtype=self._dtype)
    out, state = self.attention(u, c, state, opaque_state)
    x += gate1[:, :, None] * out
    x, u = modulated_norm(x, shift2, scale2, dtype=self._dtype)
    return x + gate2[:, :, None] * self.mlp(u), state


class ARFlow(nnx.Module):
  """The whole network: noisy image sequences in, velocities out.

  Forward FLOPs of an image of N tokens, 2 per multiply-add, without the patch,
  time and output layers (1% of S/2):
  L (N ((10 + 4 R) E^2 + 4 E (N + D)) + 12 E^2).
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    dtype = jnp.dtype(config.dtype)
    features = config.patch_size**2 * config.channels
    width = config.width
    self.patch_embedding = layers.linear(
      features, width, (None, "embed"), dtype=dtype, rngs=rngs
    )
    # One row per image costs nothing: the condition is float32 throughout.
    self.time_embedding = layers.TimeEmbedding(width, rngs=rngs)
    self.label_embedding = layers.LabelEmbedding(
      config.num_classes, width, rngs=rngs
    )
    self.blocks = stack.build(
      lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.depth, rngs
    )
    zero = dict(init=layers.zeros, rngs=rngs)
    self.final_modulation = layers.linear(
      width, 2 * width, (None, "embed"), dtype=jnp.float32, **zero
    )
    outputs = features * (2 if config.learn_sigma else 1)
    self.final_linear = layers.linear(
      width, outputs, ("embed", None), dtype=dtype, **zero
    )

  def __call__(
    self,
    x: Float[Array, "B S h w C"],
    t: Float[Array, "B S"],
    labels: Int[Array, "B"],
    state: State | None = None,
    *,
    opaque_state: bool = False,
  ) -> tuple[Float[Array, "B S h w C"], State]:
    """Velocity of every image, and the state of every layer after the last.

    Args:
      x: noisy images, noisiest first.
      t: the time of each image, 0 noise to 1 data.
      labels: one class per sequence; `num_classes` is the null class.
      state: what an earlier call returned, or None at the start of a sequence.
      opaque_state: the state comes and goes as the attention's implementation
        holds it, layers and batch first; what samplers want.

    Returns:
      float32 velocities shaped like `x`, and the state to pass to the next call
      when the sequence goes on.
    """
    config = self.config
    tokens = self.patch_embedding(patches.patchify(x, config.patch_size))
    table = patches.sincos_table(config.side, config.width)
    tokens = tokens.astype(jnp.float32) + table  # the residual stream
    c = self.time_embedding(t) + self.label_embedding(labels)[:, None]

    def step(block, tokens, state):
      return block(tokens, c, state, opaque_state)

    tokens, state = stack.walk(
      self.blocks, step, tokens, state, remat=config.remat
    )
    shift, scale = jnp.split(self.final_modulation(jax.nn.silu(c)), 2, axis=-1)
    _, tokens = modulated_norm(tokens, shift, scale, dtype=config.dtype)
    out = self.final_linear(tokens)
    out = patches.unpatchify(out, config.patch_size, config.side)
    return out[..., : config.channels].astype(jnp.float32), state

  def init_state(self, rows: int, *, opaque_state: bool = False) -> State:
    """The empty state of every layer, for so many sequences.

    Args:
      rows: B of the calls that it is for.
      opaque_state: as in those calls.
    """
    config = self.config
    shape = hybrid_attention.state_shape(
      batch=rows,
      tokens=config.side**2,
      heads=config.num_heads,
      head=config.width // config.num_heads,
      dtype=config.dtype,
      opaque_state=opaque_state,
      implementation=config.attention,
    )
    return jnp.zeros((config.depth, *shape))
