"""What padding takes on TPUs, as the compiler counts it."""

import jax
import pytest

from arflow_jax.analysis import tpu
from arflow_jax.parallel import lanes
from arflow_jax.training import program as program_lib
from configs.arflow import get_config


def test_tiles_are_filled_along_the_best_two_axes():
  assert lanes.padded_size((16, 256)) == 16 * 256
  assert lanes.padded_size((4608, 72)) == 4608 * 72  # turned round
  assert lanes.padded_size((28, 72, 18, 64)) == 28 * 18 * 64 * 128
  assert lanes.padded_size((3, 5)) == 8 * 128
  assert lanes.padded_size((7,)) == 7


def test_the_line_agrees_with_the_compiler(dump):
  """ARFlow-XL/2 on a v5e:16x16; no line where tiles are filled."""
  config = get_config("imagenet256-xl2").unlock()
  config.batch_size, config.mesh.fsdp = 256, 16
  program = program_lib.build(config, tpu.devices("v5e:16x16"))
  state = program.abstract_state
  line = lanes.note(state, "tpu")
  assert "72 of 1152 features, fewer than the 128 lanes" in line
  sizes = [
    (leaf.dtype.itemsize, leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(state)
  ]
  padded = sum(bytes * lanes.padded_size(shape) for bytes, shape in sizes)
  add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))
  compiled = tpu.compile_for(program.mesh, add, state)
  counted = compiled.memory_analysis().argument_size_in_bytes
  assert padded == pytest.approx(counted, rel=0.01)
  assert lanes.note(state, "gpu") is None
  config.mesh.fsdp = 8
  wide = program_lib.build(config, tpu.devices("v5e:16x16"))
  assert lanes.note(wide.abstract_state, "tpu") is None
