"""Quality of images small enough to be judged in pixel space.

The evaluator takes images in blocks as they are drawn and keeps sums, so that
no set of images is ever held as a whole.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from arflow_jax.data import sources
from arflow_jax.errors import ConfigError
from arflow_jax.metrics.frechet import frechet_distance
from arflow_jax.metrics.recognition import Recogniser
from arflow_jax.metrics.statistics import Statistics
from arflow_jax.sampling.images import from_pixels


class Score(NamedTuple):
  """Quality of one set of images.

  Attributes:
    recognised: share that the classifier gives the asked class.
    distance: Frechet distance in pixel space ([-1, 1]) to the held-out images.
  """

  recognised: float
  distance: float


class PixelEvaluator:
  """Scores images against the held-out part of the data of a config.

  Args:
    config: of the run; it names the data.
    num_samples: images to score, a multiple of the number of classes.

  Attributes:
    heldout: the classifier on the held-out images themselves.
    real: `num_samples` real training images, classes balanced: what a perfect
      model would score.
    labels: the classes to sample, in order.

  Raises:
    ConfigError: data whose pixels say nothing, or a number of images that is no
      multiple of the classes or more than there are real ones.
  """

  def __init__(self, config: ConfigDict, num_samples: int):
    if not sources.kind(config).small:
      small = [name for name, kind in sources.KINDS.items() if kind.small]
      raise ConfigError(
        f"evaluate judges data.source={' or '.join(small)} only, not"
        f" {config.data.source!r}: distances between pixels say nothing about"
        " larger images"
      )
    classes = config.model.num_classes
    if num_samples % classes or num_samples < classes:
      raise ConfigError(
        f"eval.num_samples (--num_samples) = {num_samples} must be a multiple"
        f" of {classes} classes"
      )
    train = sources.open_source(config, "train")
    heldout = sources.open_source(config, "heldout")
    each = num_samples // classes
    members = [np.flatnonzero(train.labels == c) for c in range(classes)]
    if min(map(len, members)) < each:
      raise ConfigError(
        f"eval.num_samples (--num_samples) = {num_samples} asks for {each} real"
        f" images a class; some class has only {min(map(len, members))}"
      )
    self.labels = np.repeat(np.arange(classes), each)
    everything, unseen = _stack(train), _stack(heldout)
    self._recogniser = Recogniser(everything, train.labels)
    self._reference = Statistics().add(_flat(unseen))
    right = self._recogniser.count(unseen, heldout.labels)
    self.heldout = right / len(unseen)
    self._start()
    # At random: neighbours in the file come from the same few writers.
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.choice(m, each, False) for m in members])
    self._add(self.labels, everything[chosen])
    self.real = self.score()

  def add(
    self, labels: Int[np.ndarray, "n"], images: UInt8[np.ndarray, "n h w C"]
  ) -> None:
    """Takes a block of images and the classes they were asked to be."""
    self._add(labels, from_pixels(images))

  def score(self) -> Score:
    """The score of all images since the last call.

    Raises:
      ValueError: fewer than two images.
    """
    score = Score(
      self._recognised / max(self._statistics.count, 1),
      frechet_distance(self._statistics, self._reference),
    )
    self._start()
    return score

  def _start(self) -> None:
    self._recognised, self._statistics = 0, Statistics()

  def _add(
    self, labels: Int[np.ndarray, "n"], images: Float[np.ndarray, "n h w C"]
  ) -> None:
    self._recognised += self._recogniser.count(images, labels)
    self._statistics.add(_flat(images))


def _flat(images: Float[np.ndarray, "n h w C"]) -> Float[np.ndarray, "n F"]:
  return images.reshape(len(images), -1)


def _stack(source: sources.Source) -> Float[np.ndarray, "n h w C"]:
  rng = np.random.default_rng(0)
  images = [source.get(i, False, rng) for i in range(len(source.labels))]
  return np.stack(images)
