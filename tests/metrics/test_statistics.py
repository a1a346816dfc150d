"""Statistics that come in blocks, against those of all vectors at once."""

import numpy as np
import pytest

from arflow_jax.metrics.statistics import Statistics

# Far from zero, where sums of squares would lose every digit of the covariance.
FAR = np.array([1e8, 0, -1e8])
VECTORS = FAR + np.random.RandomState(0).standard_normal((50, 3))


def _check(statistics, vectors):
  assert statistics.count == len(vectors)
  np.testing.assert_allclose(statistics.mean, vectors.mean(0), rtol=1e-14)
  wanted = np.cov(vectors, rowvar=False)
  np.testing.assert_allclose(statistics.covariance, wanted, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_blocks_of_any_size_give_the_whole(size):
  statistics = Statistics()
  for low in range(0, len(VECTORS), size):
    statistics.add(VECTORS[low : low + size])
  statistics.add(VECTORS[:0])
  _check(statistics, VECTORS)


def test_two_sets_merge():
  first, second = Statistics().add(VECTORS[:20]), Statistics().add(VECTORS[20:])
  first.merge(second)
  first.merge(Statistics())
  _check(first, VECTORS)
  _check(second, VECTORS[20:])  # unchanged
  empty = Statistics()
  empty.merge(Statistics())
  empty.merge(first)
  _check(empty, VECTORS)
  empty.add(VECTORS)
  _check(first, VECTORS)  # shares nothing with what it was merged into


def test_float32_is_summed_in_float64():
  vectors = VECTORS.astype(np.float32)
  _check(Statistics().add(vectors), vectors.astype(np.float64))


def test_a_covariance_needs_two():
  with pytest.raises(ValueError, match="two vectors or more, got 1"):
    _ = Statistics().add(VECTORS[:1]).covariance
