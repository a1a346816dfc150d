"""Rotary embedding against published values and its own properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.nn import rope
from tests.conftest import parity_files, relative_error


@pytest.mark.parametrize("path", parity_files("tables*"))
def test_published_rotations(path, load_parity):
  z = load_parity(path)
  for name, x in z.under("in/rope/").items():
    head, side = map(int, name.removeprefix("hd").split("_grid"))
    x = jnp.moveaxis(x, 1, 2)  # heads after tokens
    out = rope.rotate(x, rope.table((side,), head, 16.0))
    wanted = z[f"out/rope/{name}"]
    assert relative_error(jnp.moveaxis(out, 2, 1), wanted) < 1e-5


def test_scores_depend_on_offsets_alone():
  """q at p against k at p + d scores the same for every p."""
  cosines, sines = rope.table((8,), 16, 8.0)
  q, k = jax.random.normal(jax.random.key(0), (2, 16))
  rotated = [
    rope.rotate(jnp.tile(x, (1, 64, 1, 1)), (cosines, sines)) for x in (q, k)
  ]
  q, k = (x.reshape(8, 8, 16) for x in rotated)
  near = jnp.sum(q[:-1, :-2] * k[1:, 2:], -1)
  np.testing.assert_allclose(near, near[0, 0], rtol=1e-4)
  norms = jnp.linalg.norm(q, axis=-1)
  np.testing.assert_allclose(norms, norms[0, 0], rtol=1e-5)


def test_grids_follow_one_another():
  both = rope.table((2, 4), 8, 16.0)
  for part, a, b in zip(
    both, rope.table((2,), 8, 16.0), rope.table((4,), 8, 16.0)
  ):
    np.testing.assert_array_equal(part, np.concatenate([a, b]))


def test_a_head_that_cannot_be_split_is_refused():
  with pytest.raises(ConfigError, match="head of 6 features"):
    rope.table((2,), 6, 16.0)
