"""Printing where nobody reads and where a log cannot grow."""

import subprocess
import sys

PROGRAM = """
from arflow_jax import console
from tests import faults
console.say("first")
with faults.files_end_at(6):
  console.say("second")
console.say("third")
"""


def test_a_log_that_cannot_grow_ends_nothing(tmp_path):
  with (tmp_path / "log").open("w") as log:
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM],
      stdout=log,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  assert (done.returncode, done.stderr) == (0, "second\n")
  lines = (tmp_path / "log").read_text().splitlines()
  assert lines[0] == "first"
  assert lines[-1] == "third"
