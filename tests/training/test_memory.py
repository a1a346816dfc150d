"""What clearly does not fit a device is refused before it is compiled."""

import jax
import pytest
from jax.sharding import AbstractMesh

from arflow_jax import branches
from arflow_jax.errors import ConfigError
from arflow_jax.parallel import mesh as mesh_lib
from arflow_jax.training import memory, program, state
from tests.tiny import tiny_config


@pytest.fixture
def eight_gigabytes(monkeypatch):
  monkeypatch.setattr(mesh_lib, "memory", lambda devices: 8 * 10**9)


@pytest.mark.usefixtures("eight_gigabytes")
@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_a_batch_too_large_says_what_it_needs(family):
  one = "lower batch_size or data.sequence_length=[15], or raise"
  with pytest.raises(
    ConfigError,
    match=rf"batch_size=10000000 takes at least [\d,.]+ GB .* 8.0 GB: {one}",
  ):
    program.build(tiny_config(family, batch_size=10_000_000))
  # What can be cut into parts fits again.
  parts = {"batch_size": 1_000_000, "optimizer__accumulation": 100_000}
  program.build(tiny_config(family, **parts))


@pytest.mark.usefixtures("eight_gigabytes")
@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_a_network_too_large_says_what_it_needs(family):
  with pytest.raises(
    ConfigError,
    match=r"take [\d,.]+ GB on each device, which has 8.0 GB.*"
    r"model\.width=1000000.*mesh\.fsdp=1",
  ):
    program.build(tiny_config(family, model__width=1_000_000))


def test_micro_batches_add_up_whole_gradients():
  """Four bytes for each of them and two for each weight, where fsdp splits."""
  branch = branches.build(tiny_config())
  counts = {}
  for shape in ((8, 1, 1), (2, 4, 1), (1, 4, 2)):
    mesh = AbstractMesh(shape, mesh_lib.AXES)
    params = state.abstract_params(branch, mesh)
    for parts in (1, 2):
      counts[shape, parts] = memory.gradients(params, mesh, parts)
  whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  assert counts[(8, 1, 1), 1] == counts[(8, 1, 1), 2] == whole
  assert counts[(2, 4, 1), 1] == pytest.approx(whole / 4, rel=0.05)
  assert counts[(2, 4, 1), 2] == pytest.approx(1.5 * whole, rel=0.05)
  assert counts[(1, 4, 2), 2] < 0.8 * counts[(2, 4, 1), 2]


def test_nothing_is_refused_where_memory_is_unknown(monkeypatch):
  monkeypatch.setattr(mesh_lib, "memory", lambda devices: None)
  program.build(tiny_config(batch_size=10_000_000))


class _Device:
  platform, id = "gpu", 0

  def __init__(self, memory_stats):
    self.memory_stats = memory_stats


def test_memory_is_that_of_devices_that_are_here(monkeypatch):
  assert 10**8 < mesh_lib.memory(jax.devices()) < 10**15
  here, elsewhere = _Device(lambda: {"bytes_limit": 5}), _Device(None)
  monkeypatch.setattr(jax, "local_devices", lambda: [here])
  assert mesh_lib.memory([elsewhere]) is None  # of the description of a pod
  assert mesh_lib.memory([elsewhere, here]) == 5
  here.memory_stats = lambda: None
  assert mesh_lib.memory([here]) is None
