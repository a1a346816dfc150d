"""Patch order and position table against published values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.nn import layers, patches
from tests.conftest import parity_files, relative_error


def test_position_table_golden():
  table = patches.sincos_table(3, 8)
  wanted = [0.9093, 0.02, -0.41615, 0.9998, 0.84147, 0.01, 0.5403, 0.99995]
  np.testing.assert_allclose(table[1 * 3 + 2], wanted, atol=1e-5)


@pytest.mark.parametrize("path", parity_files("tables*"))
def test_tables(path, load_parity):
  z = load_parity(path)
  for name, wanted in z.under("out/pos_embed/dim").items():
    width, side = map(int, name.split("_grid"))
    ours = patches.sincos_table(side, width)
    assert relative_error(ours, wanted) < 1e-6
  # Times that are integers reach 1000, of which a float32 sine knows 1e-4.
  for kind, limit in (("continuous", 1e-6), ("integer", 1e-4)):
    for name, wanted in z.under(f"out/timestep/{kind}_dim").items():
      t = z[f"in/timestep/{kind}"].astype(jnp.float32)
      ours = layers.timestep_features(t, int(name))
      np.testing.assert_allclose(ours, wanted, rtol=0, atol=limit)


def test_odd_features_end_in_zero():
  out = layers.timestep_features(jnp.array([0.5]), 7)
  assert out.shape == (1, 7)
  assert out[0, -1] == 0


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_unpatchify_inverts_patchify(lead):
  x = jax.random.normal(jax.random.key(0), (*lead, 6, 6, 3))
  tokens = patches.patchify(x, 2)
  assert tokens.shape == (*lead, 9, 12)
  np.testing.assert_array_equal(patches.unpatchify(tokens, 2, 3), x)


def test_tokens_are_row_major_and_channels_fastest():
  x = np.arange(4 * 4 * 2, dtype=np.float32).reshape(4, 4, 2)
  tokens = patches.patchify(jnp.asarray(x), 2)
  np.testing.assert_array_equal(tokens[1, :4], [4, 5, 6, 7])
  np.testing.assert_array_equal(tokens[2, :2], x[2, 0])


def test_bad_width_is_refused():
  with pytest.raises(ConfigError, match="width=6"):
    patches.sincos_table(3, 6)


def test_a_norm_against_float64():
  x = np.random.RandomState(0).standard_normal((3, 5, 16)) * 3 + 1
  x32 = jnp.asarray(x, "float32")
  rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  assert relative_error(layers.rms_norm(x32), rms) < 1e-6
