"""Reading the TPU compiler's figures: on programs with known answers."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from arflow_jax.analysis import tpu
from arflow_jax.errors import ConfigError


class Text:
  """Stands for a compiled program."""

  def __init__(self, text: str):
    self.as_text = lambda: text


PROGRAM = Text("""HloModule step

%inner (a: f32[8]) -> f32[8] {
  %fusion.1 = f32[8]{0} fusion(%a), backend_config={"estimated_cycles":"10"}
  ROOT %kernel.3 = f32[8] custom-call(%a), custom_call_target="tpu_custom_call"
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.2 = f32[8]{0} fusion(%x), backend_config={"estimated_cycles":"100"}
  %call.1 = f32[8]{0} call(%fusion.2), to_apply=%inner
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %copy.1 = f32[2,4]{0,1} copy(%x), backend_config={"estimated_cycles":"1000"}
  %copy.2 = f32[2,5]{0,1} copy(%y)
  ROOT %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body
}
""")


def test_loops_count_as_often_as_they_run():
  cycles, kernels = tpu.estimated_cycles(PROGRAM)
  assert cycles == 1000 + 7 * (100 + 10)
  assert kernels == {"kernel.3": 7}


def test_a_block_is_moved_when_its_index_changes():
  def kernel(x, y, out):
    out[...] = x[...] + y[...]

  def add(x, y):
    return pl.pallas_call(
      kernel,
      grid=(4, 3),
      in_specs=[
        pl.BlockSpec((8, 128), lambda i, j: (i, j)),  # twelve blocks
        pl.BlockSpec((8, 128), lambda i, j: (i, 0)),  # four
      ],
      out_specs=pl.BlockSpec((8, 128), lambda i, j: (0, j)),  # back and forth
      out_shape=jax.ShapeDtypeStruct((8, 384), jnp.float32),
      name="add",
    )(x, y)

  x = jax.ShapeDtypeStruct((32, 384), jnp.float32)
  y = jax.ShapeDtypeStruct((32, 128), jnp.float32)
  (call,) = tpu.calls(lambda x, y: jax.jit(add)(x, y), x, y)
  assert call == tpu.Call("add", 12, (12 + 4 + 12) * 8 * 128 * 4)


def test_no_libtpu_is_one_clear_error(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r'pip install "jax\[tpu\]=='):
    tpu.prepare(tmp_path)
