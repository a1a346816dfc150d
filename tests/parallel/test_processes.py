"""Rows by sharding, also where a process's rows are scattered."""

import pathlib
import re
import signal
import threading

import jax
import numpy as np
import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import processes
from tests.job import started, two_processes

PROGRAM = """
import jax, numpy as np
from jax.sharding import Mesh
from arflow_jax.parallel import agreement, mesh, processes

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
answer = processes.ask(lambda: (process, 3 - process))
total = jax.jit(lambda x: weights @ x)(array)  # dispatched in between
flags += answer()
processes.say("one voice")
first = processes.common(rows)
print(process, rows.tolist(), mine.tolist(), first.tolist(), flags)

# Agreement: one wrong setting, one failure, one decision for all.
def said(function, *args):
  try:
    return function(*args)
  except Exception as error:
    return f"{type(error).__name__}: {error}"

agreement.compare(*agreement._program())
facts = agreement.Facts("settings", {"steps": 4 + process}, "mend it")
print(said(agreement.compare, facts))
print(said(agreement.together, lambda: 1 // process))
print("decided by", agreement.by_one(lambda: ["x" * 2000, process])[1])
"""


def test_two_processes_with_scattered_rows():
  """Two processes of two devices, in an order that mixes their rows."""
  first, second = two_processes(PROGRAM, devices=2)
  flags = "(True, False, True, 1, 3)"
  ours = "[0, 1, 4, 5]"
  differ = (
    "ConfigError: the processes differ in settings: steps is 4 in process 0, 5"
    " in process 1; mend it"
  )
  failed = "ZeroDivisionError: integer division or modulo by zero"
  assert first == [
    "one voice",
    f"0 {ours} {ours} {ours} {flags}",
    differ,
    failed,
    "decided by 0",
  ]
  theirs, ours = ours, "[2, 3, 6, 7]"
  assert second == [
    f"1 {ours} {ours} {theirs} {flags}",
    differ,
    f"Elsewhere: process 0 has failed: {failed}",
    "decided by 0",
  ]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other(lost):
  """Also where it waits for nothing: within 30 s, with an abort."""
  program = (
    "import time; from arflow_jax.parallel import processes; processes.start();"
    " print('ready', flush=True); time.sleep(100)"
  )
  with started(program) as both:
    for process in both:
      assert process.stdout.readline() == "ready\n"
    both[lost].kill()
    assert both[1 - lost].wait(30) == -signal.SIGABRT


def test_one_process_is_the_case_of_one():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  processes.start()
  assert processes.speaks()
  assert processes.agree(True, False) == (True, False)
  seen = [1]
  answer = processes.ask(lambda: seen)
  seen[0] = 2  # the latest counts
  assert answer() == (2,)
  assert not processes.preempted(1)
  assert not processes.leave(ValueError())
  assert processes.common(np.arange(3)).tolist() == [0, 1, 2]
  np.testing.assert_array_equal(processes.rows(sharding, 5), np.arange(5))
  images = np.arange(10).reshape(5, 2)
  array = processes.place(sharding, images, 5)
  rows, data = processes.local(array)
  np.testing.assert_array_equal(rows, np.arange(5))
  np.testing.assert_array_equal(data, images)


def _caused(error):
  error.__cause__ = jax.errors.JaxRuntimeError("a peer is gone")
  return error


@pytest.mark.parametrize(
  ("error", "own"),
  [
    (ConfigError("a setting"), True),
    (_caused(ConfigError("a read")), False),
    (OSError("a save"), False),
    (jax.errors.JaxRuntimeError("a peer is gone"), False),
  ],
)
@pytest.mark.parametrize("met", [True, False])
def test_who_fails_leaves_when_no_other_can_be_the_cause(
  monkeypatch, error, own, met
):
  others, waits = threading.Event(), []
  if met:
    others.set()
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax.distributed, "shutdown", others.wait)
  join = threading.Thread.join
  monkeypatch.setattr(
    threading.Thread, "join", lambda t, s: waits.append(s) or join(t, 0.2)
  )
  assert processes.leave(error) is not met
  others.set()
  assert waits == [5 if own else processes.HEARTBEAT + 5]


def test_a_connection_that_broke_is_known(monkeypatch):
  text = "Gloo all-reduce failed: [pair.cc] Connection reset by peer"
  broken = jax.errors.JaxRuntimeError(f"INTERNAL: {text}")
  assert not processes.cut_off(broken)  # one process has no other
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  assert processes.cut_off(broken)
  assert processes.cut_off(ValueError(f"UNKNOWN: {text}"))
  assert not processes.cut_off(jax.errors.JaxRuntimeError("INTERNAL: a kernel"))
  assert not processes.cut_off(ConfigError("Connection reset by peer"))


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


def test_a_number_outside_the_job_is_refused(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "2")
  with pytest.raises(ConfigError, match="are numbered from 0 to 1"):
    processes.start()


STEP = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "0",
  "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
  ("environment", "platforms", "known"),
  [
    ({}, None, False),
    ({}, "cpu", False),
    ({}, "tpu,cpu", True),  # a TPU VM, which has metadata
    ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", True),  # GKE
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", False),
    ({"TPU_PROCESS_ADDRESSES": "a:1,a:2"}, "tpu,cpu", True),
    (
      {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
      "tpu",
      True,
    ),
    (STEP, None, True),
    (STEP | {"SLURM_NTASKS": "1"}, None, False),
    (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None, False),  # a shell of salloc
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None, False),  # no step
  ],
)
def test_where_jax_finds_the_job(environment, platforms, known):
  assert processes.known_to_jax(environment, platforms) is known


@pytest.mark.parametrize(
  ("error", "refused"),
  [
    (None, False),
    (ValueError("coordinator_address should be defined."), True),
    (RuntimeError("initialize() must be called before any computation"), False),
  ],
)
def test_jax_is_asked_for_the_job(monkeypatch, error, refused):
  asked = []

  def initialize(*args, **settings):
    asked.append((args, settings))
    if error:
      raise error

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  for name, value in STEP.items():
    monkeypatch.setenv(name, value)
  if refused:
    with pytest.raises(
      ConfigError, match="processes of the job cannot be found"
    ):
      processes.start()
  else:  # also where a device of a single process is in use
    processes.start()
  assert asked == [((), {"heartbeat_timeout_seconds": processes.HEARTBEAT})]


def test_nothing_else_asks_jax_for_a_process():
  package = pathlib.Path(processes.__file__).parents[1]
  asking = {
    str(path.relative_to(package))
    for path in package.rglob("*.py")
    if re.search(r"process_index|process_count|multihost", path.read_text())
  }
  assert asking == {"parallel/processes.py"}
