"""Rows by sharding, also where a process's rows are scattered."""

import pathlib
import re

import jax
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from tests.job import two_processes

PROGRAM = """
import jax, numpy as np
from jax.sharding import Mesh
from arflow_jax.parallel import mesh, processes

processes.start()
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(2, 2)  # not in order
sharding = mesh.batch_sharding(Mesh(devices, ("data", "fsdp")))
rows = processes.rows(sharding, 8)
whole = np.arange(8 * 3).reshape(8, 3).astype(np.float32)
array = processes.place(sharding, {"x": whole[rows]}, 8)["x"]
weights = np.arange(8, dtype=np.float32)
total = jax.jit(lambda x: weights @ x)(array)
np.testing.assert_array_equal(total, weights @ whole)
mine, data = processes.local(array)
np.testing.assert_array_equal(data, whole[mine])
process = jax.process_index()
flags = processes.agree(process == 1, False, True)
processes.say("one voice")
first = processes.common(rows)
print(process, rows.tolist(), mine.tolist(), first.tolist(), flags)
"""


def test_two_processes_with_scattered_rows():
  """Two processes of two devices, in an order that mixes their rows."""
  first, second = two_processes(PROGRAM, devices=2)
  flags = "(True, False, True)"
  ours = "[0, 1, 4, 5]"
  assert first == ["one voice", f"0 {ours} {ours} {ours} {flags}"]
  theirs, ours = ours, "[2, 3, 6, 7]"
  assert second == [f"1 {ours} {ours} {theirs} {flags}"]


def test_one_process_is_the_case_of_one():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  processes.start()
  assert processes.speaks()
  assert processes.agree(True, False) == (True, False)
  assert processes.common(np.arange(3)).tolist() == [0, 1, 2]
  np.testing.assert_array_equal(processes.rows(sharding, 5), np.arange(5))
  images = np.arange(10).reshape(5, 2)
  array = processes.place(sharding, images, 5)
  rows, data = processes.local(array)
  np.testing.assert_array_equal(rows, np.arange(5))
  np.testing.assert_array_equal(data, images)


@pytest.mark.parametrize(
  "given",
  [
    {"JAX_NUM_PROCESSES": "2"},
    {"JAX_PROCESS_ID": "1"},
    {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two"},
  ],
)
def test_half_a_job_is_refused(monkeypatch, given):
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match="do not name a job; set all three"):
    processes.start()


def test_nothing_else_asks_jax_for_a_process():
  package = pathlib.Path(processes.__file__).parents[1]
  asking = {
    str(path.relative_to(package))
    for path in package.rglob("*.py")
    if re.search(r"process_index|process_count|multihost", path.read_text())
  }
  assert asking == {"parallel/processes.py"}
