"""Guidance: what it combines, when it applies, and what it costs outside."""

import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax.flow.guidance import Guidance, guide


def test_combine_guides_the_chosen_channels_only():
  cond = jnp.array([[1.0, 1.0, 1.0, 1.0]])
  uncond = jnp.array([[0.0, 0.5, 1.0, 0.0]])
  out = Guidance(3.0, channels=3).combine(cond, uncond)
  np.testing.assert_allclose(out, [[3.0, 2.0, 1.0, 1.0]])
  out = Guidance(3.0).combine(cond, uncond)
  np.testing.assert_allclose(out, [[3.0, 2.0, 1.0, 3.0]])


def _calls(interval, scale=2.0):
  """Calls of the pair and the single half, and the velocities, on 11 times."""
  times = np.arange(11, dtype=np.float32) / 10  # bounds stand on the grid

  def pair(x, t, calls):
    return x, 0 * x, (calls[0] + 1, calls[1])

  def single(x, t, calls):
    return x, (calls[0], calls[1] + 1)

  calls, seen = (0, 0), []
  for velocity, t in zip(
    guide(pair, single, Guidance(scale, interval), times), times
  ):
    v, calls = velocity(jnp.ones((1, 1, 1, 1)), jnp.asarray(t), calls)
    seen.append(float(v[0, 0, 0, 0]))
  return calls, seen


@pytest.mark.parametrize(
  ("interval", "inside"), [((0.0, 1.0), 11), ((0.2, 0.7), 6), ((0.7, 0.9), 3)]
)
def test_the_pair_runs_inside_the_interval_only(interval, inside):
  calls, seen = _calls(interval)
  assert calls == (inside, 11 - inside)
  assert seen.count(2.0) == inside


def test_scale_one_never_computes_the_unconditional_half():
  assert _calls((0.0, 1.0), scale=1.0)[0] == (0, 11)
