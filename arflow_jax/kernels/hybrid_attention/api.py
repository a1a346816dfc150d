"""The public hybrid-attention operator and its dispatch.

ARFlow (arXiv 2501.16085), section 3.3: tokens attend with softmax inside their
own image and read earlier images through a gated `D x D` state per head.
"""

import functools
import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arflow_jax.errors import ConfigError
from arflow_jax.kernels import kept, shards
from arflow_jax.kernels.hybrid_attention import pallas_tpu, reference, xla

IMPLEMENTATIONS: dict[str, Callable] = {
  "reference": reference.hybrid_attention,
  "xla": xla.hybrid_attention,
  "xla_cudnn": functools.partial(xla.hybrid_attention, cudnn=True),
  "pallas_tpu": pallas_tpu.hybrid_attention,
  "pallas_tpu_interpret": functools.partial(
    pallas_tpu.hybrid_attention, interpret=True
  ),
}


def hybrid_attention(
  q: Float[Array, "B T HD"],
  k: Float[Array, "B T HD"],
  v: Float[Array, "B T HD"],
  log_gate: Float[Array, "B T H"],
  state: Float[Array, "B H D D"] | Float[Array, "B ..."] | None = None,
  *,
  num_chunks: int,
  normalize: bool = False,
  output_gate: Float[Array, "B T HD"] | None = None,
  opaque_state: bool = False,
  implementation: str | None = None,
) -> tuple[Float[Array, "B T HD"], Float[Array, "B ..."]]:
  """Softmax attention inside each chunk plus a gated read of earlier chunks.

  With `S = num_chunks` images of `N = T / S` tokens, per head and image s:

      k_s    = k_s / sqrt(D)
      out_s  = softmax(q_s k_s^T) v_s + (exp(cumsum(g_s)) * q_s) M_s
      M_s+1  = exp(mean(g_s)) M_s + k_s^T v_s

  where `g = log_gate`, the cumulative sum is inclusive and runs over the tokens
  of the image, and `M_0` is `state`.

  Under an ambient mesh (`jax.set_mesh`) every device computes its own shard:
  heads over the mesh axis `tensor`, if there is one, the batch over all others.
  XLA handles axes that do not divide. It cannot split a Pallas kernel: on
  several TPUs the mesh must be set.

  Args:
    q: queries, heads packed: feature `h * D + d` belongs to head h.
    k: keys, packed likewise, not yet scaled.
    v: values, packed likewise.
    log_gate: float32 log decays, at most 0, one per token and head; the number
      of heads H is taken from it.
    state: float32 memory left by earlier chunks; None stands for zeros.
    num_chunks: S, the number of images that the T tokens hold.
    normalize: q, k and v are first divided by their root mean square over all
      H*D features, eps 1e-6, no gain.
    output_gate: if given, the output is `rms_norm(out) * silu(output_gate)`,
      the norm over the features of each head with eps 1e-6 and no gain.
    opaque_state: the memory comes and goes as the implementation holds it,
      batch first, which spares a conversion each way: hand back what the call
      before returned. By default it is [B, H, D, D].
    implementation: `reference` (plain float32, slow), `xla` (fast on every
      platform), `xla_cudnn` (experimental: the same with cuDNN's attention
      inside images, not yet measured on a GPU), `pallas_tpu`,
      `pallas_tpu_interpret` (the same on any machine, very slow), or None for
      the best one known. A named one is used, or an error is raised.

  Returns:
    The output in the type of q, packed like the inputs, and the float32 memory
    after the last chunk.

  Raises:
    ValueError: shapes or types that do not fit together.
    ConfigError: an unknown implementation, or one that cannot serve this size,
      this platform or this mesh.
  """
  batch, length, width = q.shape
  heads = log_gate.shape[-1]
  if num_chunks < 1 or length % num_chunks:
    raise ValueError(
      f"num_chunks={num_chunks} does not divide the {length} tokens of q"
    )
  if width % heads:
    raise ValueError(
      f"log_gate has {heads} heads, which do not divide the width {width} of q"
    )
  if log_gate.dtype != jnp.float32:
    raise ValueError(f"log_gate must be float32, got {log_gate.dtype}")
  for name, x in dict(k=k, v=v, output_gate=output_gate).items():
    if x is not None and x.dtype != q.dtype:
      raise ValueError(f"{name} is {x.dtype}, q is {q.dtype}: cast them alike")
  if state is not None and state.dtype != jnp.float32:
    raise ValueError(f"state must be float32, got {state.dtype}")
  shapes = {"k": k.shape, "v": v.shape, "log_gate": log_gate.shape[:2]}
  wanted = {"k": q.shape, "v": q.shape, "log_gate": q.shape[:2]}
  head = width // heads
  if output_gate is not None:
    shapes["output_gate"], wanted["output_gate"] = output_gate.shape, q.shape
  if state is not None and not opaque_state:
    shapes["state"], wanted["state"] = state.shape, (batch, heads, head, head)
  for name, shape in shapes.items():
    if shape != wanted[name]:
      raise ValueError(
        f"{name} has shape {shape}, expected {wanted[name]} for q of {q.shape}"
      )
  size = dict(
    batch=batch,
    tokens=length // num_chunks,
    heads=heads,
    head=head,
    dtype=q.dtype,
  )
  name = _choose(implementation, **size)
  fused = name.startswith("pallas")  # with norms and gate, or without
  if opaque_state and state is not None:
    held = _opaque_shape(name, **size)
    if state.shape != held:
      raise ValueError(
        f"opaque state has shape {state.shape}, {name} holds {held}: hand back"
        " what a call of the same implementation returned"
      )
  by_image = (batch, num_chunks, length // num_chunks, width)
  if normalize and not fused:
    q, k, v = (
      _rms_norm(x.reshape(by_image)).reshape(x.shape) for x in (q, k, v)
    )
  operands = dict(q=q, k=k, v=v, log_gate=log_gate, state=state)
  if fused:
    scales = _inverse_rms(q, k, v) if normalize else None
    operands |= dict(output_gate=output_gate, scales=scales)
  function = functools.partial(IMPLEMENTATIONS[name], num_chunks=num_chunks)
  if fused:
    function = functools.partial(function, packed=opaque_state)
  out, state = shards.call(
    function,
    operands,
    batch,
    heads,
  )
  if output_gate is not None and not fused:
    by_head = _rms_norm(out.reshape(batch, num_chunks, -1, heads, head))
    gate = jax.nn.silu(output_gate.reshape(by_image))
    out = (by_head.reshape(by_image) * gate).reshape(out.shape)
  return kept.keep(out, kept.ATTENTION), state


def state_shape(
  *,
  batch: int,
  tokens: int,
  heads: int,
  head: int,
  dtype: jax.typing.DTypeLike,
  opaque_state: bool = False,
  implementation: str | None = None,
) -> tuple[int, ...]:
  """Shape of the memory that `hybrid_attention` takes and returns.

  Under the same ambient mesh as the call, for an opaque memory depends on the
  implementation that is chosen there.

  Args:
    batch: B, over all devices.
    tokens: N, tokens of an image.
    heads: H, over all devices.
    head: D, head size.
    dtype: of q, k and v.
    opaque_state: as in the call.
    implementation: as in the call.

  Raises:
    ConfigError: as the call does.
  """
  size = dict(
    batch=batch, tokens=tokens, heads=heads, head=head, dtype=jnp.dtype(dtype)
  )
  name = _choose(implementation, **size)
  if opaque_state:
    return _opaque_shape(name, **size)
  return (batch, heads, head, head)


def form(
  *,
  batch: int,
  tokens: int,
  heads: int,
  head: int,
  dtype: jax.typing.DTypeLike,
  implementation: str | None = None,
) -> str | None:
  """One line on which form a call takes under the ambient mesh, on a TPU.

  Args:
    batch: B, over all devices.
    tokens: N, tokens of an image.
    heads: H, over all devices.
    head: D, head size.
    dtype: of q, k and v.
    implementation: as in the call.

  Raises:
    ConfigError: as the call does.
  """
  size = dict(
    batch=batch, tokens=tokens, heads=heads, head=head, dtype=jnp.dtype(dtype)
  )
  name, said = _resolve(implementation, **size)
  if shards.platform() != "tpu":
    return None  # nothing faster is there to be missed
  return said or f"hybrid attention takes the form {name}"


def _choose(implementation: str | None, **size) -> str:
  """The implementation that is called; raises ConfigError if there is none."""
  name, said = _resolve(implementation, **size)
  if said:
    _say_once(said)
  return name


def _resolve(implementation: str | None, **size) -> tuple[str, str | None]:
  """The implementation, and why it is not the best one, where it is not."""
  name = implementation
  if name is None:
    name = "pallas_tpu" if shards.platform() == "tpu" else "xla"
  reason = misfit(name, **size)
  if reason and implementation:
    raise ConfigError(
      f"implementation={name!r}: {reason}; leave it out for the best there is"
    )
  if reason:
    said = f"hybrid attention takes the XLA form, not {name}: {reason}"
    return "xla", said
  return name, None


def _opaque_shape(name: str, **size) -> tuple[int, ...]:
  if name.startswith("pallas"):
    return pallas_tpu.Plan(images=1, **size).arrays.memory.shape
  return (size["batch"], size["heads"], size["head"], size["head"])


@functools.cache
def _say_once(message: str) -> None:
  warnings.warn(message, stacklevel=4)


def _rms_norm(x: Float[Array, "*lead E"]) -> Float[Array, "*lead E"]:
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)
  return (x32 * scale).astype(x.dtype)


def _inverse_rms(*arrays: Float[Array, "B T HD"]) -> Float[Array, "B n T"]:
  squares = [jnp.square(x.astype(jnp.float32)).mean(-1) for x in arrays]
  squares = kept.keep(jnp.stack(squares, axis=1), kept.ATTENTION)
  return jax.lax.rsqrt(squares + 1e-6)


def misfit(
  implementation: str,
  *,
  tokens: int,
  heads: int,
  head: int,
  dtype: jax.typing.DTypeLike,
  batch: int | None = None,
) -> str | None:
  """Why an implementation cannot serve here, or None where it can.

  Args:
    implementation: its name.
    tokens: N, tokens of an image.
    heads: H, over all devices.
    head: D, head size.
    dtype: of q, k and v.
    batch: B, over all devices; None leaves platform and mesh out of question.
  """
  if implementation not in IMPLEMENTATIONS:
    return f"unknown; choose from {sorted(IMPLEMENTATIONS)}"
  dtype = jnp.dtype(dtype)
  if implementation == "xla_cudnn":
    if batch and shards.platform() not in ("gpu", "cuda"):
      return f"it needs an NVIDIA GPU, this is a {shards.platform()}"
    if dtype != jnp.bfloat16 or head % 8 or head > 128:
      return (
        f"cuDNN takes bfloat16 and head sizes that are multiples of 8 up to"
        f" 128, not {dtype} and {head}"
      )
  if not implementation.startswith("pallas"):
    return None
  plan = functools.partial(
    pallas_tpu.Plan, images=1, tokens=tokens, head=head, dtype=dtype
  )
  if batch is None:
    return plan(batch=1, heads=heads).misfit()
  if implementation == "pallas_tpu" and shards.platform() != "tpu":
    return f"it needs a TPU, this is a {shards.platform()}"
  if explicit := shards.explicit_axes():
    return f"mesh axes {explicit} are explicit; make them AxisType.Auto"
  batch_axes, heads_axes, sizes = shards.axes()
  across = math.prod(sizes[axis] for axis in batch_axes)
  if batch % across:
    return (
      f"the batch of {batch} does not divide over the {across} devices of the"
      f" mesh axes {batch_axes}"
    )
  tensor = math.prod(sizes[axis] for axis in heads_axes)
  whole = plan(batch=1, heads=heads)
  if whole.groups % tensor:
    return (
      f"mesh axis {shards.HEADS_AXIS}={tensor} does not divide the"
      f" {whole.groups} groups of {whole.per_group} heads"
    )
  return plan(batch=1, heads=heads // tensor).misfit()
