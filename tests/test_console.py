"""Printing where nobody reads and where a log cannot grow."""

import os
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


def test_closed_standard_files_get_no_other_output(tmp_path):
  """Numbers 0 to 2 go to nowhere, not to the next file that is opened."""
  program = """
import os, sys
from arflow_jax import console
console.hold()
for name in ("stdout", "stderr"):
  print("lost", file=getattr(sys, name), flush=True)
raise SystemExit(os.open("file", os.O_CREAT | os.O_WRONLY))
"""
  done = subprocess.run(
    f"exec {sys.executable} -c '{program}' <&- >&- 2>&-",
    shell=True,
    cwd=tmp_path,
    env={"PYTHONPATH": os.getcwd()},
    check=False,
  )
  assert done.returncode == 3
  assert (tmp_path / "file").read_text() == ""


def test_a_reader_who_leaves_ends_nothing():
  """As `head -1` does."""
  program = """
import sys
from arflow_jax import console
console.say("first")
sys.stdin.readline()
for _ in range(3):
  console.say("more")
print("at the end, by print")
"""
  pipe = subprocess.PIPE
  with subprocess.Popen(
    [sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe
  ) as process:
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
  assert process.returncode == 0
