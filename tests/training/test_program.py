"""One program from a config and devices, real ones or a pod's description."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from arflow_jax.errors import ConfigError
from arflow_jax.training import program as program_lib
from tests.tiny import batches, tiny_config


@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_shapes_are_those_of_a_real_step(family):
  program = program_lib.build(tiny_config(family))
  batch = program.place(next(batches(program.config)))
  describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
  wanted = jax.tree.map(describe, program.abstract_batch)
  assert jax.tree.map(describe, batch) == wanted
  state, metrics = jax.eval_shape(program.step, program.abstract_state, batch)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(state) == shapes(program.abstract_state)
  assert metrics.keys() == {"loss", "grad_norm", "param_norm"}
  np.testing.assert_array_equal(program.rows, np.arange(4))


def test_devices_may_be_given_and_must_fit():
  device = jax.devices()[:1]
  program = program_lib.build(tiny_config(), device)
  assert list(program.mesh.devices.flat) == device
  with pytest.raises(ConfigError, match="does not make 1 devices; the nearest"):
    program_lib.build(tiny_config(mesh__fsdp=2), device)


def test_batches_are_split_over_the_whole_mesh():
  program = program_lib.build(tiny_config())
  images = program.abstract_batch["images"]
  assert images.sharding.spec == PartitionSpec(("data", "fsdp"))
  assert images.dtype == jnp.float32
  assert program.abstract_batch["labels"].dtype == jnp.int32
