"""Meshes and shardings from config, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, PartitionSpec
from ml_collections import ConfigDict

from arflow_jax import branches
from arflow_jax.config import flatten
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import optimizer, state
from tests.tiny import tiny_config


def _sizes(data=-1, fsdp=1, tensor=1):
  return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


def _mesh(data=1, fsdp=1, tensor=1):
  return AbstractMesh((data, fsdp, tensor), mesh_lib.AXES)


def test_one_device_takes_everything():
  mesh = mesh_lib.make_mesh(_sizes())
  wanted = {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
  assert dict(mesh.shape) == wanted


@pytest.mark.parametrize(
  ("asked", "found"),
  [
    ((-1, 2, 1), (4, 2, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 2, -1), (1, 2, 4)),
    ((2, 2, 2), (2, 2, 2)),
    ((8, 1, -1), (8, 1, 1)),
  ],
)
def test_any_one_axis_can_take_the_rest(asked, found):
  assert mesh_lib.sizes(_sizes(*asked), 8) == found


@pytest.mark.parametrize(
  ("asked", "nearest"),
  [
    ((3, 2, 1), (4, 2, 1)),
    ((-1, 5, 1), (2, 4, 1)),
    ((-1, 1, 3), (2, 1, 4)),
    ((0, 1, 1), (8, 1, 1)),
    ((2, 2, 1), (4, 2, 1)),
    ((16, -1, 1), (8, 1, 1)),
  ],
)
def test_sizes_that_do_not_fit_are_refused_and_the_nearest_named(
  asked, nearest
):
  with pytest.raises(ConfigError) as refused:
    mesh_lib.sizes(_sizes(*asked), 8)
  name = "mesh.data={} x mesh.fsdp={} x mesh.tensor={}".format
  assert str(refused.value) == (
    f"{name(*asked)} does not make 8 devices; the nearest that does:"
    f" {name(*nearest)}"
  )
  assert mesh_lib.sizes(_sizes(*nearest), 8) == nearest


@pytest.mark.parametrize(
  ("asked", "count", "found"),
  [
    ((-1, 0, 1), 1, (1, 1, 1)),
    ((-1, 0, 1), 4, (1, 4, 1)),
    ((-1, 0, 1), 6, (3, 2, 1)),
    ((-1, 0, 1), 256, (16, 16, 1)),
    ((-1, 0, 4), 8, (1, 2, 4)),
    ((4, 0, 1), 8, (4, 2, 1)),
    ((2, 0, -1), 8, (2, 4, 1)),
  ],
)
def test_fsdp_can_follow_from_the_devices(asked, count, found):
  assert mesh_lib.sizes(_sizes(*asked), count) == found


def test_fsdp_from_the_devices_stays_within_a_slice():
  assert mesh_lib.sizes(_sizes(fsdp=0), 16, slices=4) == (4, 4, 1)


def test_only_one_axis_can_take_the_rest():
  with pytest.raises(ConfigError, match=r"mesh.fsdp=-1.* only one"):
    mesh_lib.sizes(_sizes(fsdp=-1), 8)


def test_given_devices_make_the_mesh():
  devices = jax.devices()[:1]
  mesh = mesh_lib.make_mesh(_sizes(1), devices)
  assert list(mesh.devices.flat) == devices


def test_slices_are_the_outer_part_of_data(dump):
  """Only gradients cross between them."""
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2", num_slices=2
  ).devices
  mesh = mesh_lib.make_mesh(_sizes(fsdp=2), devices)
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  np.testing.assert_array_equal(slices[:2], np.zeros((2, 2, 1)))
  np.testing.assert_array_equal(slices[2:], np.ones((2, 2, 1)))
  with pytest.raises(ConfigError, match=r"mesh.data=1 .* of the 2 slices"):
    mesh_lib.make_mesh(_sizes(fsdp=8), devices)


@pytest.mark.parametrize(
  ("batch", "parts", "named"),
  [
    (4, 3, r"accumulation=3 does not divide batch_size=4; .* does: 2 or 4$"),
    (4, 0, r"optimizer.accumulation=0 .*: 1$"),
    (4, 9, r"optimizer.accumulation=9 .*: 4$"),
    (10, 2, r"batch_size=10 is not a multiple of 8 .*: 8 or 16$"),
    (6, 2, r"batch_size=6 is not a multiple of 8 .*: 8$"),
  ],
)
def test_batches_that_do_not_divide_are_refused(batch, parts, named):
  with pytest.raises(ConfigError, match=named):
    mesh_lib.check_batch(_mesh(2, 2, 4), batch, parts)


def test_tensor_splits_no_batch():
  mesh_lib.check_batch(_mesh(2, 2, 4), 8, 2)
  mesh = mesh_lib.make_mesh(_sizes(1), jax.devices()[:1])
  spec = mesh_lib.batch_sharding(mesh).spec
  assert spec == PartitionSpec(("data", "fsdp"))


def test_names_decide_the_sharding():
  axes = {"kernel": ("embed", "mlp"), "bias": ("mlp",), "table": (None, None)}
  shapes = {
    "kernel": jax.ShapeDtypeStruct((3, 8, 6), jnp.float32),
    "bias": jax.ShapeDtypeStruct((3, 6), jnp.float32),
    "table": jax.ShapeDtypeStruct((5, 7), jnp.float32),
  }
  placed = mesh_lib.param_shardings(axes, shapes, _mesh(2, 4, 2))
  assert placed["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
  assert placed["bias"].spec == PartitionSpec(None, "tensor")
  assert placed["table"].spec == PartitionSpec(None, None)


def test_an_axis_that_does_not_divide_is_refused_by_name():
  """And what is proposed divides every parameter and the devices."""
  axes = {"a": ("embed", None), "b": ("embed",)}
  shapes = {
    "a": jax.ShapeDtypeStruct((12, 5), jnp.float32),
    "b": jax.ShapeDtypeStruct((6,), jnp.float32),
  }
  with pytest.raises(
    ConfigError, match=r"mesh.fsdp=4 does not divide 6.*'b'.* divides all: 2$"
  ):
    mesh_lib.param_shardings(axes, shapes, _mesh(2, 4))


# Into how many parts of a 2 x 2 x 2 mesh each parameter is split; all others
# into 2, over fsdp alone.
PARTS = {
  "arflow": {
    **dict.fromkeys(
      [f"blocks.attention.{k}_proj.kernel" for k in "qkv"]
      + [f"blocks.attention.{k}_proj.kernel" for k in ("gate", "decay", "out")]
      + ["blocks.mlp.fc1.kernel", "blocks.mlp.fc2.kernel"],
      4,
    ),
    "final_linear.bias": 1,  # four numbers
  },
  "flowar": {
    **dict.fromkeys(
      [
        f"{part}.{k}.kernel"
        for part in ("encoder", "decoder", "head.blocks")
        for k in ("mlp.gate", "mlp.value", "mlp.fc2")
      ]
      + [
        f"{part}.{k}.kernel"
        for part in ("encoder", "decoder", "head.blocks.attention")
        for k in ("qkv", "proj")
      ]
      + [f"head.blocks.cross.{k}.kernel" for k in ("q", "kv", "proj")],
      4,
    ),
    "head.final_linear.bias": 1,
  },
}


@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_nothing_is_replicated_in_silence(family):
  """Bytes per device of parameters, averages and moments, and who has them."""
  changes = {"model__cross_attention": True, "model__head_width": 256}
  config = tiny_config(family, **changes if family == "flowar" else {})
  branch = branches.build(config)
  tx = optimizer.make_optimizer(config.optimizer, branch.axes)
  abstract = state.abstract_state(branch, tx, _mesh(2, 2, 2))

  def held(tree):
    return sum(
      leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
      for leaf in jax.tree.leaves(tree)
    )

  params = flatten(abstract.params)
  parts = {name: 4 * leaf.size / held(leaf) for name, leaf in params.items()}
  assert parts == dict.fromkeys(params, 2) | PARTS[family]
  assert held(abstract.ema) == held(params)
  # Two moments, and counters that are whole everywhere.
  assert 0 <= held(abstract.opt_state) - 2 * held(params) <= 16
