"""Mean and covariance of vectors that come in blocks, in float64.

Blocks are merged by the pairwise update of Chan, Golub and LeVeque (1979): the
sums are about the mean, so that nothing cancels however many vectors come.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Num


@dataclasses.dataclass
class Statistics:
  """Of no vector yet, until `add` or `merge`.

  Attributes:
    count: vectors so far.
    mean: `[F]`; 0 before the first vector.
    scatter: sum of the outer products of (vector - mean), `[F, F]`.
  """

  count: int = 0
  mean: Float[np.ndarray, "F"] | float = 0.0
  scatter: Float[np.ndarray, "F F"] | float = 0.0

  def add(self, vectors: Num[np.ndarray, "n F"]) -> "Statistics":
    """Takes a block of any size and returns self."""
    if len(vectors):
      vectors = np.asarray(vectors, np.float64)
      mean = vectors.mean(0)
      centred = vectors - mean
      self.merge(Statistics(len(vectors), mean, centred.T @ centred))
    return self

  def merge(self, other: "Statistics") -> None:
    """Takes all that `other` has seen."""
    count = self.count + other.count
    if not count:
      return
    shift = other.mean - self.mean
    weight = self.count * other.count / count
    self.scatter += other.scatter + weight * np.multiply.outer(shift, shift)
    self.mean += shift * (other.count / count)
    self.count = count

  @property
  def covariance(self) -> Float[np.ndarray, "F F"]:
    """The unbiased covariance.

    Raises:
      ValueError: fewer than two vectors.
    """
    if self.count < 2:
      raise ValueError(f"need two vectors or more, got {self.count}")
    return self.scatter / (self.count - 1)
