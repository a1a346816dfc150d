"""How the TPU kernels cut a problem: lane groups, tiles, programs, blocks.

A *group* is the heads that share the 128 lanes of a register. One program takes
one image and as many groups as fit into VMEM; the images of a sequence follow
one another on the last grid axis, so that the memory stays in VMEM.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Queries a tile: the lanes of a register hold queries, its sublanes keys.
TILE = 128
# Heads of 64 in images of up to 256 tokens, as published, stay under the
# compiler's default limit of VMEM on v5e and v5p; other sizes ask for more.
_DEFAULT_LIMIT = 16 * 2**20
_RAISED_LIMIT = 32 * 2**20
HEAD_SIZES = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Plan:
  """One problem size and how it is cut.

  Attributes:
    batch: B, sequences.
    images: S, images in a sequence.
    tokens: N, tokens of an image.
    heads: H.
    head: D, head size.
    dtype: of q, k, v and the output.
    gated: the output is normalised per head and gated.
    stateful: there is a memory before the first image.
    held: blocks of tokens that a program holds, in and out: fewer in the
      forward kernel, which then takes more groups at once.
  """

  batch: int
  images: int
  tokens: int
  heads: int
  head: int
  dtype: jnp.dtype
  gated: bool = False
  stateful: bool = False
  held: int = 10

  def misfit(self) -> str | None:
    """Why no kernel serves this size, or None."""
    if self.dtype not in (jnp.float32, jnp.bfloat16):
      return f"q is {self.dtype}; the kernel takes float32 or bfloat16"
    if self.head not in HEAD_SIZES:
      return f"the head size is {self.head}; the kernel takes {HEAD_SIZES}"
    if self.width > LANES and self.width % LANES:
      return (
        f"the width {self.width} of {self.heads} heads is not a multiple of"
        f" {LANES}"
      )
    if self.tokens % 16:
      return (
        f"an image has {self.tokens} tokens; the kernel takes multiples of 16"
      )
    if self._vmem(1) > self.limit:
      return f"{self.tokens} tokens an image do not fit into VMEM"
    return None

  @property
  def width(self) -> int:
    return self.heads * self.head

  @property
  def lanes(self) -> int:
    """Features of a group."""
    return min(self.width, LANES)

  @property
  def per_group(self) -> int:
    """Heads of a group."""
    return self.lanes // self.head

  @property
  def groups(self) -> int:
    return self.width // self.lanes

  @property
  def per_program(self) -> int:
    """Groups that one program takes: the most that fit into VMEM."""
    fits = (
      n
      for n in range(self.groups, 0, -1)
      if self.groups % n == 0 and self._vmem(n) <= self.limit
    )
    return next(fits, 1)

  @property
  def tiles(self) -> list[slice]:
    """The queries of an image, a tile at a time."""
    return [
      slice(begin, min(begin + TILE, self.tokens))
      for begin in range(0, self.tokens, TILE)
    ]

  @property
  def items(self) -> list[tuple[int, slice, int]]:
    """What a program does, in order: (group, queries, head of the group)."""
    return [
      (group, tile, head)
      for group in range(self.per_program)
      for tile in self.tiles
      for head in range(self.per_group)
    ]

  def _vmem(self, groups: int) -> int:
    """Bytes of a program of so many groups: two buffers a block."""
    size = self.dtype.itemsize
    blocks = self.held * self.tokens * groups * self.lanes * size
    blocks += 3 * self.head * groups * self.lanes * 4
    # Values and spills, fitted to what libtpu 0.0.42 reports.
    full = self.dtype == jnp.float32
    values = (6 * 2**20, 7 * 2**10) if full else (3.5 * 2**20, 3.5 * 2**10)
    return 2 * blocks + int(values[0] + values[1] * self.tokens)

  @property
  def limit(self) -> int:
    """Bytes of VMEM that a program may take."""
    usual = self.head == 64 and self.tokens <= 256
    return _DEFAULT_LIMIT if usual else _RAISED_LIMIT

  @property
  def grid(self) -> tuple[int, int, int]:
    return (self.batch, self.groups // self.per_program, self.images)

  def blocks(self, *, reverse: bool = False) -> "Blocks":
    """The blocks of every kind of operand; `reverse` walks images backwards."""
    images = self.images
    turn = (lambda s: images - 1 - s) if reverse else (lambda s: s)
    count = self.per_program
    width, heads = count * self.lanes, count * self.per_group
    return Blocks(
      tokens=pl.BlockSpec(
        (1, self.tokens, width), lambda b, g, s: (b, turn(s), g)
      ),
      rows=pl.BlockSpec(
        (1, 1, 1, heads, self.tokens), lambda b, g, s: (b, turn(s), g, 0, 0)
      ),
      scales=pl.BlockSpec(
        (1, 1, 3, self.tokens), lambda b, g, s: (b, turn(s), 0, 0)
      ),
      d_scales=pl.BlockSpec(
        (1, 1, 1, 3, self.tokens), lambda b, g, s: (b, turn(s), g, 0, 0)
      ),
      features=pl.BlockSpec(
        (1, 1, 1, width), lambda b, g, s: (b, turn(s), 0, g)
      ),
      memory=pl.BlockSpec(
        (1, count, self.head, self.lanes), lambda b, g, s: (b, g, 0, 0)
      ),
      memories=pl.BlockSpec(
        (1, 1, count, self.head, self.lanes),
        lambda b, g, s: (b, turn(s), g, 0, 0),
      ),
    )

  @property
  def arrays(self) -> "Arrays":
    """Shapes and types of every kind of operand."""
    shape = jax.ShapeDtypeStruct
    memory = (self.groups, self.head, self.lanes)
    parts = self.groups // self.per_program
    lead = (self.batch, self.images)
    return Arrays(
      tokens=shape(
        (self.batch, self.images * self.tokens, self.width), self.dtype
      ),
      rows=shape((*lead, parts, self.heads // parts, self.tokens), jnp.float32),
      scales=shape((*lead, 3, self.tokens), jnp.float32),
      d_scales=shape((*lead, parts, 3, self.tokens), jnp.float32),
      features=shape((*lead, 1, self.width), jnp.float32),
      memory=shape((self.batch, *memory), jnp.float32),
      memories=shape((*lead, *memory), self.dtype),
    )

  @property
  def scratch(self) -> list[Any]:
    """The memory of the groups of one program, carried from image to image."""
    shape = (self.per_program, self.head, self.lanes)
    return [pltpu.VMEM(shape, jnp.float32)]

  @property
  def compiler_params(self) -> pltpu.CompilerParams:
    raised = self.limit if self.limit > _DEFAULT_LIMIT else None
    return pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=raised,
    )

  def cost(self, inner: int, outer: int, operands: list[Any]) -> Any:
    """What a kernel costs: products over (N, N, D) and over (N, D, D)."""
    heads = self.batch * self.images * self.heads
    inner_flops = 2 * self.tokens**2 * self.head * inner
    outer_flops = 2 * self.tokens * self.head**2 * outer
    return pl.CostEstimate(
      flops=heads * (inner_flops + outer_flops),
      transcendentals=heads * self.tokens**2,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands),
    )


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Block of each kind of operand, see `Arrays`."""

  tokens: pl.BlockSpec
  rows: pl.BlockSpec
  scales: pl.BlockSpec
  d_scales: pl.BlockSpec
  features: pl.BlockSpec
  memory: pl.BlockSpec
  memories: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Kinds of operands.

  Attributes:
    tokens: [B, T, H*D], q, k, v, the output and their gradients.
    rows: [B, S, parts, H/parts, N] float32, one number per head and token.
    scales: [B, S, 3, N] float32, a factor of each token's q, k and v.
    d_scales: [B, S, parts, 3, N] float32, their gradients, in summands.
    features: [B, S, 1, H*D] float32, one number per image and feature.
    memory: [B, groups, D, lanes] float32, the packed state: [e, (h, d)].
    memories: [B, S, groups, D, lanes], the packed state that each image reads.
  """

  tokens: jax.ShapeDtypeStruct
  rows: jax.ShapeDtypeStruct
  scales: jax.ShapeDtypeStruct
  d_scales: jax.ShapeDtypeStruct
  features: jax.ShapeDtypeStruct
  memory: jax.ShapeDtypeStruct
  memories: jax.ShapeDtypeStruct


def pipelined(
  items: list[Any],
  ahead: int,
  first: Callable[[Any], Any],
  second: Callable[[Any, Any], None],
) -> None:
  """Runs `second(item, first(item))`, each `first` some items ahead.

  The compiler keeps close to the order of the program: without this, matrix
  units wait while a softmax is computed, and the other way round.
  """
  waiting: dict[int, Any] = {}
  for i in range(len(items) + ahead):
    if i < len(items):
      waiting[i] = first(items[i])
    if i >= ahead:
      second(items[i - ahead], waiting.pop(i - ahead))
