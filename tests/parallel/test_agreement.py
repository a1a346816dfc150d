"""Processes that differ, and processes that fail alone."""

import pytest

from arflow_jax.errors import ConfigError
from arflow_jax.parallel import agreement, processes
from tests.job import started
from tests.tiny import flags

SAME = agreement.Facts("their settings", {"steps": 4, "a": "x"}, "mend it")


def _facts(**values):
  return SAME._replace(values=dict(SAME.values) | values)


def _others(monkeypatch, *answers):
  """Makes `gather` bring what other processes would have sent, call by call."""
  answers = iter(answers)
  monkeypatch.setattr(
    processes, "gather", lambda value: [value, *next(answers)]
  )


def test_one_process_agrees_with_itself():
  agreement.compare(SAME, *agreement._program())
  assert agreement.together(lambda: 3) == 3
  assert agreement.by_one(lambda: {"a": [1, None]}) == {"a": [1, None]}
  assert processes.gather("é" * 5000) == ["é" * 5000]  # needs a second round
  with pytest.raises(OSError, match="disk"):
    agreement.by_one(lambda: _fail(OSError("disk")))


def _fail(error):
  raise error


def test_a_difference_names_the_part_the_values_and_the_processes(monkeypatch):
  other = _facts(steps=5, b=1)
  digests = [agreement._digest(f.values) for f in (SAME, other)]
  _others(
    monkeypatch,
    [[digests[1]], [digests[0]], [digests[1]]],
    [dict(other.values), dict(SAME.values), dict(other.values)],
  )
  with pytest.raises(ConfigError) as error:
    agreement.compare(SAME)
  assert str(error.value) == (
    "the processes differ in their settings: b is missing in processes 0, 2, 1"
    " in processes 1, 3 (1 more differ); mend it"
  )


def test_many_processes_and_long_values_stay_one_line(monkeypatch):
  every = [_facts(steps="x" * 500 + str(i % 2)) for i in range(1, 40)]
  _others(
    monkeypatch,
    [[agreement._digest(f.values)] for f in every],
    [dict(f.values) for f in every],
  )
  with pytest.raises(ConfigError) as error:
    agreement.compare(_facts(steps="x" * 500 + "0"))
  assert len(str(error.value)) < 400
  assert "processes 0, 2, 4, 6, 8, 10, 12, 14 and 12 more" in str(error.value)


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (ConfigError("data.dir='x' is wrong\nmore"), "data.dir='x' is wrong"),
    (FileNotFoundError(2, "No such file", "x.npz"), "x.npz: No such file"),
    (KeyError("x"), "KeyError: 'x'"),
  ],
)
def test_an_error_elsewhere_is_one_here(monkeypatch, error, line):
  sent = []
  monkeypatch.setattr(
    processes, "gather", lambda value: sent.append(value) or [None, value]
  )
  with pytest.raises(type(error)):  # its own error where it failed
    agreement.together(lambda: _fail(error))
  assert sent == [line]
  monkeypatch.setattr(processes, "gather", lambda value: [value, line])
  with pytest.raises(agreement.Elsewhere) as found:
    agreement.together(lambda: 3)
  assert str(found.value) == f"process 1 has failed: {line}"


# A trainer, changed in one process.
TRAIN = """
import os, sys
from arflow_jax import cli, train
number = int(os.environ["JAX_PROCESS_ID"])
argv = {argv!r}
if number == 1:
  {change}
sys.modules["train"], sys.argv = train, ["train", *argv]
cli.run("train")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("change", "first", "second"),
  [
    (
      "argv.append('--config.optimizer.peak_lr=0.1')",
      "the processes differ in their settings: optimizer.peak_lr is 0.003 in"
      " process 0, 0.1 in process 1; start all with the same command",
      None,
    ),
    (
      "import jax; jax.__version__ = '0.1'",
      "differ in versions: JAX is '0.",
      None,
    ),
    (
      "from arflow_jax.parallel import agreement as a; code = a._code();"
      " a._code = lambda: code | {'train.py': 'x'}",
      "differ in the code of arflow_jax: train.py is '",
      None,
    ),
    (
      "from arflow_jax.data import sources as s; f = s.fingerprint;"
      " s.fingerprint = lambda x: f(x) | {'images': [9, *f(x)['images'][1:]]}",
      "differ in their data: class 0 is '0 with 139 images' in process 0, '0"
      " with 9 images' in process 1; give all the same data",
      None,
    ),
    (
      "from arflow_jax.data import sources as s; s.Digits = s.Tfds.__init__;"
      " s.Digits = lambda split: s.Tfds('cifar10', 'nowhere', split)",
      "process 1 has failed: data.dir='nowhere' is not a directory",
      "error: data.dir='nowhere' is not a directory",
    ),
  ],
  ids=["config", "versions", "code", "data", "failure"],
)
def test_two_processes_that_differ_end_at_once(change, first, second, tmp_path):
  """With one line and exit code 1 in both, before anything is written."""
  argv = [*flags(), f"--workdir={tmp_path / 'run'}"]
  with started(TRAIN.format(argv=argv, change=change)) as both:
    said = [process.communicate(timeout=60)[1] for process in both]
  assert [process.returncode for process in both] == [1, 1], said
  lines = [
    [line for line in text.splitlines() if line.startswith("error:")]
    for text in said
  ]
  assert [len(found) for found in lines] == [1, 1], said
  assert first in lines[0][0]
  assert (second or first) in lines[1][0]
  assert not any("Traceback" in text for text in said)
  assert not (tmp_path / "run").exists()


MAIN = """
import importlib, sys
from arflow_jax import cli
from arflow_jax.analysis import benchmark
benchmark.product_side = lambda: 64
sys.argv = {argv!r}
sys.modules["main"] = importlib.import_module(sys.argv[0])
cli.run("main")
"""


@pytest.mark.slow
def test_other_mains_join_and_speak_once(tmp_path):
  """Two processes verify a run, and time a step that they share."""
  run = "--workdir=tests/sampling/tiny_run"
  with started(MAIN.format(argv=["arflow_jax.verify", run])) as both:
    said = [process.communicate(timeout=60) for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  assert "checkpoint 200: readable" in said[0][0]
  assert "checkpoint" not in said[1][0]

  out = tmp_path / "speed.json"
  argv = ["arflow_jax.bench", *flags(), f"--out={out}"]
  with started(MAIN.format(argv=argv)) as both:
    said = [process.communicate(timeout=120) for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  assert "images_per_second" in out.read_text()
  assert str(out) in said[0][0]
  assert "train" not in said[1][0]
  with started(MAIN.format(argv=argv)) as both:
    said = [process.communicate(timeout=60) for process in both]
  assert [process.returncode for process in both] == [1, 1], said
  assert f"--out={out} exists; give --overwrite" in said[1][1]
