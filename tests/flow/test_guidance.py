"""Guidance: what it combines, when it applies, and what it costs outside."""

import jax
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


def _counting(interval, scale=2.0):
  def pair(x, t, calls):
    return x, 0 * x, (calls[0] + 1, calls[1])

  def single(x, t, calls):
    return x, (calls[0], calls[1] + 1)

  return guide(pair, single, Guidance(scale, interval))


@pytest.mark.parametrize(
  ("interval", "inside"), [((0.0, 1.0), 11), ((0.2, 0.7), 6), ((0.7, 0.9), 3)]
)
def test_the_pair_runs_inside_the_interval_only(interval, inside):
  velocity = _counting(interval)

  def step(calls, t):
    v, calls = velocity(jnp.ones((1, 1, 1, 1)), t, calls)
    return calls, v

  times = jnp.arange(11, dtype=jnp.float32) / 10  # bounds stand on the grid
  start = (jnp.int32(0), jnp.int32(0))
  calls, v = jax.jit(lambda: jax.lax.scan(step, start, times))()
  assert tuple(map(int, calls)) == (inside, 11 - inside)
  assert int((v == 2).sum()) == inside


def test_scale_one_never_computes_the_unconditional_half():
  velocity = _counting((0.0, 1.0), scale=1.0)
  x = jnp.ones((1, 1, 1, 1))
  _, calls = velocity(x, jnp.float32(0.5), (0, 0))
  assert calls == (0, 1)
