"""Frechet distance with known answers, and the pixel-space evaluator."""

import numpy as np
import pytest
import scipy.linalg

from arflow_jax.errors import ConfigError
from arflow_jax.metrics.frechet import frechet_distance
from arflow_jax.metrics.pixels import PixelEvaluator
from configs.arflow import get_config


def test_frechet_against_the_matrix_square_root():
  rs = np.random.RandomState(0)
  a = rs.standard_normal((50, 6)) @ rs.standard_normal((6, 6))
  b = rs.standard_normal((70, 6)) + 2
  ca, cb = np.cov(a.T), np.cov(b.T)
  root = scipy.linalg.sqrtm(ca @ cb).real
  wanted = np.sum((a.mean(0) - b.mean(0)) ** 2)
  wanted += np.trace(ca + cb - 2 * root)
  np.testing.assert_allclose(frechet_distance(a, b), wanted, rtol=1e-8)
  np.testing.assert_allclose(frechet_distance(a, a), 0, atol=1e-8)
  np.testing.assert_allclose(frechet_distance(a, a + 3), 6 * 9, rtol=1e-8)


def test_frechet_needs_two():
  with pytest.raises(ValueError, match="two"):
    frechet_distance(np.zeros((1, 2)), np.zeros((5, 2)))


def test_pixel_evaluator_knows_good_from_bad():
  config = get_config("digits")
  evaluator = PixelEvaluator(config)
  assert evaluator.heldout > 0.98
  assert evaluator.real.recognised > 0.99
  rs = np.random.RandomState(0)
  noise = lambda labels: iter(
    [rs.randint(0, 256, (len(labels), 8, 8, 1)).astype(np.uint8)]
  )
  bad = evaluator.score(noise)
  assert bad.recognised < 0.3
  assert bad.distance > 10 * evaluator.real.distance

  from arflow_jax.data.sources import Digits

  train = Digits("train")

  def perfect(labels):
    rows = [np.flatnonzero(train.labels == c) for c in range(10)]
    chosen = [rs.choice(rows[c]) for c in labels]
    yield np.clip(127.5 * train.images[chosen] + 128, 0, 255).astype(np.uint8)

  good = evaluator.score(perfect)
  assert good.recognised > 0.99
  assert good.distance < 2 * evaluator.real.distance


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    ({"data.source": "tfds:x"}, "data.source=digits only"),
    ({"eval.num_samples": 15}, "eval.num_samples=15"),
    ({"eval.num_samples": 5000}, "500 real images a class"),
  ],
)
def test_bad_settings_are_refused_by_name(overrides, named):
  config = get_config("digits")
  config.update_from_flattened_dict(overrides)
  with pytest.raises(ConfigError, match=named):
    PixelEvaluator(config)
