"""Two trainers in one workdir."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.training import lock, loop
from tests.tiny import tiny_config

HOLD = """
import sys, time
from arflow_jax.training import lock
with lock.held(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  with subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_a_second_trainer_is_told_who_is_there(holder, tmp_path):
  said = (
    rf"in use by another trainer \(process {holder.pid} on \S+ since 20\d\d"
  )
  with pytest.raises(ConfigError, match=said):
    loop.train(tiny_config(), str(tmp_path))
  assert {p.name for p in tmp_path.iterdir()} == {"trainer.lock"}
  # A dead trainer holds nothing, whatever it has left.
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  with lock.held(str(tmp_path)):
    name = (pathlib.Path(tmp_path) / "trainer.lock").read_text()
  assert name.startswith(f"process {os.getpid()} on ")


def test_the_lock_is_given_back(tmp_path):
  with lock.held(str(tmp_path)):
    pass
  with subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "held\n"
    process.kill()


def test_a_bucket_has_no_lock(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with lock.held("gs://name/run"):
    assert list(tmp_path.iterdir()) == []
