"""Shapes that tests and benchmarks of every implementation share."""

from typing import NamedTuple


class Case(NamedTuple):
  """One problem size: images, tokens an image, heads and head size."""

  batch: int
  images: int
  tokens: int
  heads: int
  head: int


SMALL = (
  Case(batch=2, images=5, tokens=16, heads=2, head=32),
  Case(batch=1, images=3, tokens=64, heads=1, head=64),
  Case(batch=2, images=4, tokens=4, heads=3, head=16),
  Case(batch=1, images=1, tokens=9, heads=2, head=8),
  Case(batch=1, images=11, tokens=4, heads=1, head=8),  # longer than unrolled
)
