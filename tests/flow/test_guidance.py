"""Guidance: what it combines, when it applies, what it costs and drops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.flow.guidance import Guidance, drop_label, guide, with_null


def test_combine_guides_the_chosen_channels_only():
  cond = jnp.array([[1.0, 1.0, 1.0, 1.0]])
  uncond = jnp.array([[0.0, 0.5, 1.0, 0.0]])
  out = Guidance(3.0, (0.0, 1.0), 3).combine(cond, uncond)
  np.testing.assert_allclose(out, [[3.0, 2.0, 1.0, 1.0]])
  out = Guidance(3.0, (0.0, 1.0), None).combine(cond, uncond)
  np.testing.assert_allclose(out, [[3.0, 2.0, 1.0, 3.0]])


def _calls(interval, scale=2.0):
  """Calls with one half and with two, and the velocities, on 11 times."""
  times = np.arange(11, dtype=np.float32) / 10  # bounds stand on the grid
  guidance = Guidance(scale, interval, None)

  def velocity(x, t, calls):
    """1 in the first half, 0 in the second."""
    one, two = calls
    halves = x.shape[0] // 3
    v = x.at[3:].set(0.0)
    return v, (one + (halves == 1), two + (halves == 2))

  calls, seen = (0, 0), []
  for guided, t in zip(guide(velocity, guidance, times), times):
    v, calls = guided(jnp.ones((3, 1, 1, 1)), jnp.asarray(t), calls)
    assert v.shape == (3, 1, 1, 1)
    seen.append(float(v[0, 0, 0, 0]))
  assert calls[1] == guidance.inside(times).sum()
  return calls, seen


@pytest.mark.parametrize(
  ("interval", "inside"), [((0.0, 1.0), 11), ((0.2, 0.7), 6), ((0.7, 0.9), 3)]
)
def test_both_halves_run_inside_the_interval_only(interval, inside):
  calls, seen = _calls(interval)
  assert calls == (11 - inside, inside)
  assert seen.count(2.0) == inside


def test_scale_one_never_computes_the_unconditional_half():
  assert _calls((0.0, 1.0), scale=1.0)[0] == (11, 0)


def test_labels_of_both_halves():
  both = with_null(jnp.array([3, 10, 0]), 10)
  np.testing.assert_array_equal(both, [3, 10, 0, 10, 10, 10])


def test_labels_are_dropped_by_their_own_keys():
  keys = jax.random.split(jax.random.key(0), 2000)
  labels = jnp.arange(2000) % 10
  drop = lambda rate: jax.vmap(lambda k, y: drop_label(k, y, 10, rate))
  found = drop(0.1)(keys, labels)
  dropped = jax.vmap(jax.random.uniform)(keys) < 0.1
  assert 0.07 < dropped.mean() < 0.13
  np.testing.assert_array_equal(found, jnp.where(dropped, 10, labels))
  np.testing.assert_array_equal(drop(0.0)(keys, labels), labels)
