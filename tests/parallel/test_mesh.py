"""Meshes and shardings from config, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from ml_collections import ConfigDict

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib


def test_one_device_takes_everything():
  mesh = mesh_lib.make_mesh(ConfigDict({"data": -1, "fsdp": 1}))
  assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1}


@pytest.mark.parametrize(
  "sizes",
  [{"data": 3, "fsdp": 1}, {"data": -1, "fsdp": 5}, {"data": 0, "fsdp": 1}],
)
def test_sizes_that_do_not_fit_are_refused(sizes):
  with pytest.raises(ConfigError, match=f"mesh.data={sizes['data']}"):
    mesh_lib.make_mesh(ConfigDict(sizes))


def test_given_devices_make_the_mesh():
  devices = jax.devices()[:1]
  mesh = mesh_lib.make_mesh(ConfigDict({"data": 1, "fsdp": 1}), devices)
  assert list(mesh.devices.flat) == devices
  with pytest.raises(ConfigError, match="does not make 8 devices"):
    mesh_lib.sizes(ConfigDict({"data": 3, "fsdp": 2}), 8)
  assert mesh_lib.sizes(ConfigDict({"data": -1, "fsdp": 2}), 8) == (4, 2)


@pytest.mark.parametrize(
  ("batch", "parts", "named"),
  [
    (4, 3, "optimizer.accumulation=3 does not divide batch_size=4"),
    (4, 0, "optimizer.accumulation=0"),
    (6, 2, "batch_size=3 .per micro-batch. is not a multiple of the 2"),
  ],
)
def test_batches_that_do_not_divide_are_refused(batch, parts, named):
  mesh = AbstractMesh((2, 1), ("data", "fsdp"))
  with pytest.raises(ConfigError, match=named):
    mesh_lib.check_batch(mesh, batch, parts)


def test_names_decide_the_sharding():
  mesh = AbstractMesh((2, 4), ("data", "fsdp"))
  axes = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
  shapes = {
    "kernel": jax.ShapeDtypeStruct((3, 8, 5), jnp.float32),
    "bias": jax.ShapeDtypeStruct((3, 5), jnp.float32),
  }
  placed = mesh_lib.param_shardings(axes, shapes, mesh)
  assert placed["kernel"].spec == PartitionSpec(None, "fsdp", None)
  assert placed["bias"].spec == PartitionSpec(None, None)


def test_an_axis_that_does_not_divide_is_refused_by_name():
  mesh = AbstractMesh((2, 4), ("data", "fsdp"))
  shapes = {"kernel": jax.ShapeDtypeStruct((6, 5), jnp.float32)}
  with pytest.raises(
    ConfigError, match=r"mesh.fsdp=4 does not divide 6.*kernel"
  ):
    mesh_lib.param_shardings({"kernel": ("embed", None)}, shapes, mesh)


def test_batches_are_split_over_both_axes():
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")
  )
  assert mesh_lib.batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
