"""Training items: sequences of distinct images of one class, by index.

Item i is a pure function of (seed, i), so the position in the data is one
integer and every process can make any row of any batch. As published (ARFlow,
arXiv 2501.16085): a class uniformly, then images of it without replacement.
"""

import numpy as np

from arflow_jax.data.sources import Source
from arflow_jax.errors import ConfigError


class ClassSequences:
  """Random access to an endless stream of class-grouped sequences.

  Args:
    source: the labelled images.
    length: images per sequence, all of one class and all distinct.
    seed: of the whole stream.
    flip: mirror each image with probability 1/2, independently.

  Raises:
    ConfigError: a class with fewer than `length` images.
  """

  def __init__(self, source: Source, length: int, seed: int, flip: bool):
    if length < 1:
      raise ConfigError(f"data.sequence_length={length} must be at least 1")
    self.source, self._length = source, length
    self._seed, self._flip = seed, flip
    classes = range(len(source.class_names))
    self._members = [np.flatnonzero(source.labels == c) for c in classes]
    for name, members in zip(source.class_names, self._members):
      if len(members) < length:
        raise ConfigError(
          f"class {name!r} has {len(members)} images, fewer than"
          f" data.sequence_length={length}; shorten the sequences or add images"
        )

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Item `index`: `images [S, h, w, C]` float32 and `labels []` int32.

    Raises:
      ConfigError: an image that is not finite, or cannot be decoded.
      OSError: an image that could not be read.
    """
    rng = np.random.default_rng([self._seed, index])
    label = rng.integers(len(self._members))
    chosen = rng.choice(self._members[label], self._length, replace=False)
    mirror = (rng.random(self._length) < 0.5) & self._flip
    images = np.stack(
      [
        self.source.get(int(i), bool(flag), own)
        for i, flag, own in zip(chosen, mirror, rng.spawn(self._length))
      ]
    )
    finite = np.isfinite(images).all((1, 2, 3))
    if not finite.all():  # else a loss that is not finite would be blamed
      raise ConfigError(
        f"image {chosen[~finite][0]} of the data (counted from 0, class"
        f" {self.source.class_names[label]!r}) has pixels that are NaN or"
        " infinite; mend or remove it"
      )
    return {"images": images, "labels": np.int32(label)}
