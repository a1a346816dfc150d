"""A job of several processes on this machine."""

import contextlib
import os
import re
import socket
import subprocess
import sys

from tests import tiny


def two_processes(program: str, devices: int = 1) -> list[list[str]]:
  """The lines that each process prints; both must end well.

  Args:
    program: Python text that each of them runs.
    devices: of each process.
  """
  with started(program, devices) as both:
    said = [process.communicate(timeout=120) for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  return [
    [line for line in out.splitlines() if not _of_gloo(line)] for out, _ in said
  ]


@contextlib.contextmanager
def started(program: str, devices: int = 1, count: int = 2):
  """Processes of a job at work, which are killed in the end.

  Args:
    program: Python text that each of them runs.
    devices: of each process.
    count: of processes.
  """
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  environment = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(count),
  }
  with contextlib.ExitStack() as stack:
    every = [
      stack.enter_context(
        subprocess.Popen(
          [sys.executable, "-c", program],
          env=environment | {"JAX_PROCESS_ID": str(i)},
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
      for i in range(count)
    ]
    try:
      yield every
    finally:  # one that has failed leaves the others waiting
      for process in every:
        process.kill()


_MAIN = """
import importlib, os, sys
process = int(os.environ["JAX_PROCESS_ID"])
{before}
from arflow_jax import cli, signals
signals.watch()  # as a main does
name, *sys.argv[1:] = {command!r}
sys.modules[name] = importlib.import_module(name)
cli.run(name)
"""


def mains(*command: str, before: str = "", **job: int):
  """The processes of a job that run a main.

  Args:
    *command: the main, `arflow_jax.train`, and its flags.
    before: Python text that each runs before; `process` is its number.
    **job: `devices` and `count`, as for `started`.
  """
  return started(_MAIN.format(before=before, command=command), **job)


def trainers(workdir, before: str = "", devices: int = 1, **overrides):
  """Two processes of a job that train a tiny model; see `mains`.

  Args:
    workdir: of the run.
    before: as for `mains`.
    devices: of each process.
    **overrides: `group__key=value`.
  """
  # The workdir last: there `faults` looks for files of a save.
  flags = [*tiny.flags(**overrides), f"--workdir={workdir}"]
  return mains("arflow_jax.train", *flags, before=before, devices=devices)


# Sends a signal to process 1 alone, at a point of `faults`.
STRUCK = """
import signal
from tests import faults
if process == 1:
  faults._strike({point!r}, signal.{number})
"""


def _of_gloo(line: str) -> bool:
  """Its threads write into each other's lines: any piece of one may be left."""
  return bool(re.search(r"Gloo|peer ranks", line)) or not line.strip(
    ": 0123456789"
  )
