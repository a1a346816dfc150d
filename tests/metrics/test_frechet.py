"""Frechet distance with known answers."""

import numpy as np
import scipy.linalg

from arflow_jax.metrics.frechet import frechet_distance
from arflow_jax.metrics.statistics import Statistics


def _distance(a, b):
  return frechet_distance(Statistics().add(a), Statistics().add(b))


def test_frechet_against_the_matrix_square_root():
  rs = np.random.RandomState(0)
  a = rs.standard_normal((50, 6)) @ rs.standard_normal((6, 6))
  b = rs.standard_normal((70, 6)) + 2
  ca, cb = np.cov(a.T), np.cov(b.T)
  root = scipy.linalg.sqrtm(ca @ cb).real
  wanted = np.sum((a.mean(0) - b.mean(0)) ** 2)
  wanted += np.trace(ca + cb - 2 * root)
  np.testing.assert_allclose(_distance(a, b), wanted, rtol=1e-8)
  np.testing.assert_allclose(_distance(a, a), 0, atol=1e-8)
  np.testing.assert_allclose(_distance(a, a + 3), 6 * 9, rtol=1e-8)
