"""What a source does with an image: mirrors it, and draws what it needs."""

import numpy as np
import pytest

from arflow_jax.data import sequences, sources


def _tfds(data_dir):
  return sources.Tfds("cifar10_jpeg", str(data_dir / "tfds"), "heldout")


@pytest.mark.parametrize(
  "make",
  [
    lambda _: sources.Digits("train"),
    lambda _: sources.Random((4, 6, 3), 2),
    lambda request: _tfds(request.getfixturevalue("data_dir")),
  ],
  ids=["digits", "random", "tfds"],
)
def test_a_mirrored_picture_has_left_and_right_exchanged(make, request):
  source = make(request)
  rng = np.random.default_rng(0)
  plain, mirrored = (source.get(3, flag, rng) for flag in (False, True))
  assert plain.dtype == mirrored.dtype == np.float32
  np.testing.assert_array_equal(mirrored, plain[:, ::-1])
  assert not np.array_equal(mirrored, plain)


class _Drawing:
  """Images whose pixels say how they were asked for."""

  labels = np.arange(40) % 2
  class_names = ("a", "b")

  def __init__(self, draws):
    self._draws = draws

  def get(self, index, mirror, rng):
    return np.array([[[index, mirror, rng.random(self._draws)[0]]]])


def _items(seed=0, flip=True, draws=1):
  items = sequences.ClassSequences(_Drawing(draws), 5, seed, flip)
  return np.stack([items[i]["images"][:, 0, 0] for i in range(20)])


def test_every_image_has_a_generator_of_its_own():
  drawn = _items()[..., 2]
  assert len(set(drawn.ravel())) == drawn.size
  # However much is drawn for the images before it.
  np.testing.assert_array_equal(_items(draws=3)[..., 2], drawn)


def test_what_a_source_draws_is_a_function_of_seed_and_index():
  items = _items()
  np.testing.assert_array_equal(items, _items())
  assert not np.isin(_items(seed=1)[..., 2], items[..., 2]).any()
  # Neither members nor their generators depend on whether images are mirrored.
  plain = _items(flip=False)
  np.testing.assert_array_equal(plain[..., ::2], items[..., ::2])
  assert not plain[..., 1].any()
  assert 0.3 < items[..., 1].mean() < 0.7
