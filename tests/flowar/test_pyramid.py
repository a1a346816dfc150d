"""Scales and resize operators against published values and exact matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.flowar.pyramid import (
  Pyramid,
  area_matrix,
  bicubic_matrix,
  resize,
)
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)


@pytest.mark.parametrize("path", parity_files("tables*"))
def test_published_resizes(path, load_parity):
  z = load_parity(path)
  for name, x in z.under("in/resize/").items():
    below, full, size = map(int, name.split("_"))
    x = channels_last(x)
    bicubic, area = bicubic_matrix(below, full), area_matrix(full, size)
    up, whole = resize(x, bicubic), resize(x, area @ bicubic)
    wanted = z[f"out/resize/bicubic_{below}_{full}"]
    assert relative_error(channels_first(up), wanted) < 1e-5
    wanted = z[f"out/resize/area_{name}"]
    assert relative_error(channels_first(whole), wanted) < 1e-5
  for name, wanted in z.under("out/area/").items():
    full, size = map(int, name.split("_"))
    y = resize(channels_last(z[f"in/area/{full}"]), area_matrix(full, size))
    assert relative_error(channels_first(y), wanted) < 1e-5


def test_up_sampling_matrices_are_the_exact_fractions():
  """Bicubic to 16, then area: the rows of the published operators."""
  up = lambda s: area_matrix(16, 2 * s) @ bicubic_matrix(s, 16)
  np.testing.assert_allclose(up(1), np.ones((2, 1)), atol=1e-14)
  rows = np.array([[4453, -357], [3138, 958]]) / 4096
  np.testing.assert_allclose(up(2)[:2], rows, atol=1e-14)
  rows = np.array(
    [
      [1117, -93, 0, 0],
      [786, 277, -39, 0],
      [238, 879, -93, 0],
      [-93, 879, 277, -39],
    ]
  )
  np.testing.assert_allclose(up(4)[:4], rows / 1024, atol=1e-14)
  rows = np.array([[283, -27, 0, 0], [198, 67, -9, 0], [58, 225, -27, 0]])
  np.testing.assert_allclose(up(8)[:3, :4], rows / 256, atol=1e-14)
  for s in (2, 4, 8):
    np.testing.assert_allclose(up(s), up(s)[::-1, ::-1], atol=1e-14)


def test_area_covers_bins_that_do_not_divide():
  np.testing.assert_allclose(
    area_matrix(5, 2),
    [[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]],
  )


@pytest.mark.parametrize("scales", [(1, 2, 4, 8), (2, 4), (1, 2, 4, 8, 16, 32)])
@pytest.mark.parametrize("patch", [1, 2])
def test_any_doubling_scales_and_patches(scales, patch):
  pyramid = Pyramid(scales, patch)
  side = scales[-1] * patch
  assert pyramid.side == side
  x = jax.random.normal(jax.random.key(0), (2, side, side, 3))
  targets = pyramid.targets(x)
  np.testing.assert_allclose(targets[-1], x, atol=1e-6)
  for s, y in zip(scales, targets):
    assert y.shape == (2, s * patch, s * patch, 3)
    np.testing.assert_allclose(y.mean((1, 2)), x.mean((1, 2)), atol=1e-5)
    tokens = pyramid.tokens(y)
    assert tokens.shape == (2, s * s, 3 * patch**2)
    np.testing.assert_array_equal(pyramid.image(tokens), y)
  for i in range(1, len(scales)):
    up = pyramid.next_input(targets[i - 1], i)
    assert up.shape == targets[i].shape
    # Operators keep constants: their rows add up to one.
    ones = pyramid.next_input(jnp.ones_like(targets[i - 1]), i)
    np.testing.assert_allclose(ones, 1, atol=1e-5)
  np.testing.assert_allclose(pyramid.weights[-1], 1)
  np.testing.assert_allclose(pyramid.weights[0], (scales[0] / scales[-1]) ** 2)


def test_a_token_runs_channel_row_column():
  x = jnp.arange(4 * 4 * 2.0).reshape(1, 4, 4, 2)
  tokens = Pyramid((1, 2), 2).tokens(x)
  np.testing.assert_array_equal(tokens[0, 1, :4], x[0, :2, 2:, 0].ravel())
  np.testing.assert_array_equal(tokens[0, 1, 4:], x[0, :2, 2:, 1].ravel())


@pytest.mark.parametrize("scales", [(), (1, 3), (1, 2, 2), (0, 0), (4, 2)])
def test_scales_that_do_not_double_are_refused(scales):
  with pytest.raises(
    ConfigError, match=r"model\.scales=.* must be whole numbers"
  ):
    Pyramid(scales)
