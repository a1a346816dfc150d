"""Rows by sharding, also where a process's rows are scattered."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes

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
flags = [processes.agree(flag) for flag in (process == 1, False, True)]
processes.say("one voice")
print(process, rows.tolist(), mine.tolist(), flags, flush=True)
"""


def test_two_processes_with_scattered_rows():
  """Two processes of two devices, in an order that mixes their rows."""
  environment = {
    **os.environ,
    "JAX_NUM_CPU_DEVICES": "2",
    "JAX_COORDINATOR_ADDRESS": f"localhost:{20_000 + os.getpid() % 20_000}",
    "JAX_NUM_PROCESSES": "2",
  }
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM],
      env=environment | {"JAX_PROCESS_ID": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  said = [process.communicate(timeout=120) for process in started]
  assert [process.returncode for process in started] == [0, 0], said
  first, second = (
    [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    for out, _ in said
  )
  flags = "[True, False, True]"
  ours = "[0, 1, 4, 5]"
  assert first == ["one voice", f"0 {ours} {ours} {flags}"]
  ours = "[2, 3, 6, 7]"
  assert second == [f"1 {ours} {ours} {flags}"]


def test_one_process_is_the_case_of_one():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  processes.start()
  assert processes.speaks()
  assert processes.agree(True)
  assert not processes.agree(False)
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
