"""Frechet distance between two sets of feature vectors (arXiv 1706.08500)."""

import numpy as np

from arflow_jax.metrics.statistics import Statistics


def frechet_distance(a: Statistics, b: Statistics) -> float:
  """Squared 2-Wasserstein distance of the Gaussians fitted to two sets.

  |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64;
  the trace of the root is the sum of the roots of the eigenvalues.

  Raises:
    ValueError: fewer than two vectors in a set.
  """
  cov_a, cov_b = a.covariance, b.covariance
  # The product's eigenvalues are those of a symmetric one: real, never below 0.
  values, vectors = np.linalg.eigh(cov_a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  product = np.linalg.eigvalsh(root @ cov_b @ root)
  cross = np.sqrt(np.maximum(product, 0)).sum()
  shift = np.sum((a.mean - b.mean) ** 2)
  return float(shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
