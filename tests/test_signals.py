"""Ctrl-C and SIGTERM at any instant of any main: one line and a code."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.job import STRUCK, mains

ROOT = pathlib.Path(__file__).parents[1]
TINY_RUN = ROOT / "tests" / "sampling" / "tiny_run"
ENDS = {
  signal.SIGINT: (130, "interrupted"),
  signal.SIGTERM: (42, "start the same command again"),
}
CONFIG = "--config=configs/arflow.py:digits"
COMMANDS = {
  "train": [CONFIG, "--workdir={folder}/run"],
  "sample": [f"--workdir={TINY_RUN}", "--out={folder}/x", "--per_label=9999"],
  "evaluate": [f"--workdir={TINY_RUN}"],
  "bench": [CONFIG],
  "bench_attention": [],
  "preflight": [
    "--config=configs/flowar.py:imagenet256-h",
    "--topology=gpu:80GB",
  ],
  "report": [f"--workdir={TINY_RUN}", "--out={folder}/x.html"],
  "verify": [f"--workdir={TINY_RUN}"],
}
SHORT = ("report",)  # may have ended within a second


@pytest.fixture(autouse=True)
def _answering():
  """In the background or under nohup, children would ignore signals."""
  before = {
    signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
  }
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def _ended(arguments, after=0.0, number=0, begun=""):
  """Exit code and last line of a Python that got a signal.

  Args:
    arguments: of Python.
    after: seconds after it has begun.
    number: of the signal; 0 is none.
    begun: what stands at the end of a line of its errors once it has.
  """
  with subprocess.Popen(
    [sys.executable, *arguments],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  ) as process:
    while begun and not process.stderr.readline().endswith(f"{begun}\n"):
      pass
    time.sleep(after)
    process.send_signal(number)
    errors = process.stderr.read()
  lines = errors.splitlines(keepends=True)
  errors = "".join(x for x in lines if not x.startswith("import time:"))
  return process.returncode, errors.strip().rpartition("\n")[2], errors


def _check(main, folder, after, number):
  """Sends a signal so long after the first import of the main."""
  command = [text.format(folder=folder) for text in COMMANDS[main]]
  code, line, errors = _ended(
    ["-X", "importtime", "-m", f"arflow_jax.{main}", *command],
    after + 0.02,  # the handlers are there a moment after that import
    number,
    begun="arflow_jax.signals",
  )
  if number == signal.SIGINT and "before the first step" in line:
    line = "interrupted"  # what the trainer says of it
  if main in SHORT and after >= 1 and code == 0:
    assert errors == ""
    return
  assert (code, ENDS[number][1] in line) == (ENDS[number][0], True), errors
  assert "Traceback" not in errors


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("after", [0.0, 0.4])
@pytest.mark.parametrize("main", ["train", "sample"])
def test_a_signal_while_python_imports(main, after, number, tmp_path):
  _check(main, tmp_path, after, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("main", COMMANDS)
def test_a_signal_at_any_instant(main, number, tmp_path):
  for after in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 1.5, 2, 3, 5):
    _check(main, tmp_path / str(after), after, number)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("main", "point"),
  [("sample", "while drawing"), ("evaluate", "before drawing")],
)
def test_a_signal_to_one_of_two_ends_both(main, point, tmp_path):
  """JAX has a handler of its own there. The other waits for a lost process."""
  command = [f"arflow_jax.{main}", f"--workdir={TINY_RUN}"]
  command += [f"--out={tmp_path}/x"] if main == "sample" else []
  before = STRUCK.format(point=point, number="SIGTERM")
  with mains(*command, before=before) as both:
    assert "start the same command again" in both[1].communicate(timeout=100)[1]
    ended = time.monotonic()
    assert both[1].returncode == 42
    both[0].communicate(timeout=60)
    assert both[0].returncode == -signal.SIGABRT
    assert time.monotonic() - ended < 30


WAITING = """
import os, signal, time
from arflow_jax import signals
signals.cleaners.append(lambda: os.remove({file!r}))
signals.watch()
os.kill(os.getpid(), {number})
time.sleep(60)
"""


@pytest.mark.parametrize("number", [*ENDS, signal.SIGHUP])
def test_what_nobody_else_removes_is_removed(number, tmp_path):
  file = tmp_path / "file"
  file.touch()
  program = WAITING.format(file=str(file), number=int(number))
  code, line, errors = _ended(["-c", program], 0, 0)
  wanted, text = ENDS.get(number, ENDS[signal.SIGTERM])
  assert (code, text in line) == (wanted, True), errors
  assert not file.exists()


def test_what_is_told_to_ignore_ctrl_c_goes_on(tmp_path):
  program = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from arflow_jax import signals
signals.watch()
os.kill(os.getpid(), signal.SIGINT)
raise SystemExit(7)
"""
  assert _ended(["-c", program], 0, 0)[0] == 7


def test_a_signal_while_python_ends_changes_nothing(tmp_path):
  program = """
import os, signal
from arflow_jax import signals
signals.watch()
class Last:
  def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
    kill(process, number)
os.last = Last()  # goes when the modules go
"""
  assert _ended(["-c", program], 0, 0) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.png", "x.npz", "x"])
def test_sample_goes_on_wherever_it_was_interrupted(name, tmp_path):
  """While it imports, compiles, draws and writes; the images stay the same."""
  command = ["-m", "arflow_jax.sample", f"--workdir={TINY_RUN}"]
  command += ["--per_label=500", "--out={}"]
  whole, out = tmp_path / "whole" / name, tmp_path / "cut" / name
  done = lambda path: [text.format(path) for text in command]
  assert _ended(done(whole), 0, 0)[0] == 0
  for tenths in range(5, 300, 3):
    code, line, _ = _ended(done(out), tenths / 10, signal.SIGINT)
    if code != 130:
      break
  assert tenths > 20
  # It may have been interrupted when all was done but the last tidying.
  assert code == 0 or "exists; choose another" in line, line
  files = lambda path: sorted(path.iterdir()) if path.is_dir() else [path]
  for ours, theirs in zip(files(out), files(whole), strict=True):
    if name == "x.npz":
      np.testing.assert_array_equal(
        np.load(ours)["arr_0"], np.load(theirs)["arr_0"]
      )
    else:
      assert ours.read_bytes() == theirs.read_bytes()
