"""Shapes that tests and benchmarks of every implementation share."""

from typing import NamedTuple


class Case(NamedTuple):
  """One problem size: images, tokens an image, heads and head size."""

  batch: int
  images: int
  tokens: int
  heads: int
  head: int

  @property
  def name(self) -> str:
    return "B{}-S{}-N{}-H{}-D{}".format(*self)


SMALL = (
  Case(batch=2, images=5, tokens=16, heads=2, head=32),
  Case(batch=1, images=3, tokens=64, heads=1, head=64),
  Case(batch=1, images=2, tokens=48, heads=4, head=64),  # two lane groups
  Case(batch=1, images=2, tokens=144, heads=2, head=128),  # two query tiles
  Case(batch=1, images=8, tokens=16, heads=6, head=16),
  Case(batch=2, images=1, tokens=32, heads=4, head=32),
  Case(batch=2, images=4, tokens=4, heads=3, head=16),
  Case(batch=1, images=1, tokens=9, heads=2, head=8),
  Case(batch=1, images=11, tokens=4, heads=1, head=8),  # longer than unrolled
)

# Heads of 64 of the published networks; XL with patches of 4 or 8 has 16 of 72.
PUBLISHED_HEADS = {"S": 6, "B": 12, "L": 16, "XL": 18}


def published(size: str, tokens: int, images: int, batch: int) -> Case:
  """The attention of a published network: 256 tokens at 256 px, 64 at 128."""
  return Case(batch, images, tokens, PUBLISHED_HEADS[size], 64)


def flops(case: Case, *, backward: bool) -> int:
  """Model FLOPs: the products of the equations, gradients twice as many."""
  images = case.batch * case.images * case.heads
  forward = images * 4 * case.tokens * case.head * (case.tokens + case.head)
  return 3 * forward if backward else forward


def floor_bytes(
  case: Case, size: int, *, fused: bool, backward: bool, state: bool = True
) -> int:
  """Bytes where every operand is read once and every result written once.

  Args:
    case: the problem.
    size: bytes of a number of q.
    fused: with an output gate.
    backward: forward pass and gradients of all operands, else forward alone.
    state: a memory goes in.
  """
  length = case.batch * case.images * case.tokens
  tokens = length * case.heads * case.head * size
  gates = length * case.heads * 4
  memory = case.batch * case.heads * case.head**2 * 4
  operands = (3 + fused) * tokens + gates + state * memory
  results = tokens + memory
  # Backward: operands and gradients of results in, gradients of operands out.
  return operands + results + backward * (2 * operands + results)
