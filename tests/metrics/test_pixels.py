"""The pixel-space evaluator: good images from bad ones, block by block."""

import numpy as np
import pytest

from arflow_jax.data import sources
from arflow_jax.errors import ConfigError
from arflow_jax.metrics.pixels import PixelEvaluator
from configs.arflow import get_config


@pytest.fixture(scope="module")
def evaluator():
  return PixelEvaluator(get_config("digits"), 200)


def _score(evaluator, images, size=64):
  for low in range(0, len(images), size):
    block = slice(low, low + size)
    evaluator.add(evaluator.labels[block], images[block])
  return evaluator.score()


def test_good_is_known_from_bad(evaluator):
  assert evaluator.heldout > 0.98
  assert evaluator.real.recognised > 0.99
  assert np.bincount(evaluator.labels).tolist() == [20] * 10
  rs = np.random.RandomState(0)
  noise = rs.randint(0, 256, (200, 8, 8, 1)).astype(np.uint8)
  bad = _score(evaluator, noise)
  assert bad.recognised < 0.3
  assert bad.distance > 10 * evaluator.real.distance
  # What was added before the last score counts no more.
  train = sources.Digits("train")
  rows = [np.flatnonzero(train.labels == c) for c in range(10)]
  chosen = [rs.choice(rows[c]) for c in evaluator.labels]
  images = np.clip(127.5 * train.images[chosen] + 128, 0, 255).astype(np.uint8)
  good = _score(evaluator, images)
  assert good.recognised > 0.99
  assert good.distance < 2 * evaluator.real.distance
  whole = _score(evaluator, images, size=200)
  assert whole.recognised == good.recognised
  # Some pixels are never inked: roots of eigenvalues that are zero.
  np.testing.assert_allclose(whole.distance, good.distance, rtol=1e-6)


@pytest.mark.parametrize(
  ("source", "num_samples", "named"),
  [
    ("tfds:x", 400, "data.source=digits only, not 'tfds:x'"),
    ("latents", 400, "data.source=digits only, not 'latents'"),
    ("nothing", 400, "data.source='nothing' is unknown"),
    (
      "digits",
      15,
      r"\(--num_samples\) = 15 must be a multiple of 10",
    ),
    (
      "digits",
      0,
      r"\(--num_samples\) = 0 must be a multiple of 10",
    ),
    ("digits", 5000, "500 real images a class"),
  ],
)
def test_bad_settings_are_refused_by_name(source, num_samples, named):
  config = get_config("digits")
  config.data.source = source
  with pytest.raises(ConfigError, match=named):
    PixelEvaluator(config, num_samples)
