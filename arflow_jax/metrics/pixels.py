"""The report of `evaluate` on data small enough to be judged in pixel space."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from arflow_jax.data import sources
from arflow_jax.errors import ConfigError
from arflow_jax.metrics.frechet import frechet_distance
from arflow_jax.metrics.recognition import Recogniser


class Score(NamedTuple):
  """Quality of one set of images.

  Attributes:
    recognised: share that the classifier gives the asked class.
    distance: Frechet distance in pixel space ([-1, 1]) to the held-out images.
  """

  recognised: float
  distance: float


class PixelEvaluator:
  """Scores images against the held-out part of the run's data.

  Attributes:
    heldout: the classifier on the held-out images themselves.
    real: `config.eval.num_samples` real training images, classes balanced: what
      a perfect model would score.
    labels: the classes to sample, in order.
  """

  def __init__(self, config: ConfigDict):
    if config.data.source != "digits":
      raise ConfigError(
        f"evaluate judges data.source=digits only, not {config.data.source!r}:"
        " pixel-space distances say nothing about larger images"
      )
    count, classes = config.eval.num_samples, config.model.num_classes
    if count % classes or count < classes:
      raise ConfigError(
        f"eval.num_samples={count} must be a multiple of {classes} classes"
      )
    train = sources.open_source(config, "train")
    heldout = sources.open_source(config, "heldout")
    everything = _stack(train)
    self._heldout = _stack(heldout)
    self._recogniser = Recogniser(everything, train.labels)
    self.heldout = self._recogniser.accuracy(self._heldout, heldout.labels)
    each = count // classes
    self.labels = np.repeat(np.arange(classes), each)
    members = [np.flatnonzero(train.labels == c) for c in range(classes)]
    if min(map(len, members)) < each:
      raise ConfigError(
        f"eval.num_samples={count} asks for {each} real images a class; some"
        f" class has only {min(map(len, members))}"
      )
    # At random: neighbours in the file come from the same few writers.
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.choice(m, each, False) for m in members])
    self.real = self._score(everything[chosen])

  def _score(self, images: Float[np.ndarray, "n h w C"]) -> Score:
    flat = lambda x: x.reshape(len(x), -1)
    return Score(
      self._recogniser.accuracy(images, self.labels),
      frechet_distance(flat(images), flat(self._heldout)),
    )

  def score(
    self,
    draw: Callable[[np.ndarray], Iterator[UInt8[np.ndarray, "b h w C"]]],
  ) -> Score:
    """Scores the images that `draw(labels)` yields in blocks."""
    pixels = np.concatenate(list(draw(self.labels)))
    return self._score((pixels.astype(np.float32) - 128) / 127.5)


def _stack(source: sources.Source) -> Float[np.ndarray, "n h w C"]:
  rng = np.random.default_rng(0)
  images = [source.get(i, False, rng) for i in range(len(source.labels))]
  return np.stack(images)
