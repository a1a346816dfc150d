"""The mains as a user types them: help, one-line errors, whole commands."""

import subprocess
import sys

import pytest

from tests.tiny import flags

MAINS = ["train", "sample", "evaluate", "bench"]
CONFIG = "--config=configs/arflow.py:digits"
TINY_RUN = "tests/sampling/tiny_run"


def _run(main, *args):
  return subprocess.run(
    [sys.executable, "-m", f"arflow_jax.{main}", *args],
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize("main", MAINS)
def test_help_is_useful_and_quick(main):
  done = _run(main, "--help")
  assert done.returncode == 0
  assert f"python -m arflow_jax.{main}" in done.stdout
  assert "flags:" in done.stdout
  assert done.stderr == ""


def test_importing_the_package_imports_nothing_else():
  program = "import sys, arflow_jax; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout == "False\n"


def test_parsing_flags_imports_nothing_heavy():
  program = (
    "import sys; import arflow_jax.train, configs.arflow\n"
    "configs.arflow.get_config()\n"
    "heavy = {'jax', 'flax', 'tensorflow', 'sklearn', 'orbax', 'grain'}\n"
    "print(heavy & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout == "set()\n"


@pytest.mark.parametrize(
  ("main", "args", "message"),
  [
    ("train", [CONFIG], "--workdir is required"),
    ("train", ["--workdir=x"], "--config is required"),
    ("bench", [CONFIG, "--what=train,smaple"], "--what=smaple is unknown"),
    ("bench", [CONFIG, "--compare=none.json"], "--compare=none.json is no"),
    ("bench", [CONFIG, "--out=speed.txt"], "--out=speed.txt must end in .json"),
    ("train", [CONFIG, "--workdri=x"], "--workdri; did you mean --workdir?"),
    ("train", [CONFIG, "--workdir=x", "y"], "unexpected argument 'y'"),
    (
      "train",
      [CONFIG, "--workdir=x", "--config.optimizer.peek_lr=1"],
      "--config.optimizer.peek_lr; did you mean optimizer.peak_lr?",
    ),
    (
      "train",
      [CONFIG, "--workdir=x", "--config.optimizer.lr=1"],
      "--config.optimizer.lr; did you mean optimizer.peak_lr?",
    ),
    (
      "train",
      [CONFIG, "--workdir=x", "--config.optimzer.peak_lr=1"],
      "--config.optimzer.peak_lr; did you mean optimizer.peak_lr?",
    ),
    (
      "train",
      [CONFIG, "--workdir=x", "--config.foo=1"],
      "--config.foo; did you",
    ),
    ("train", [CONFIG, "--workdir="], "--workdir is required"),
    ("train", [CONFIG, "--workdir=README.md"], "README.md"),
    ("train", [CONFIG, "--workdir=x", "--config.seed=-1"], "seed=-1"),
    (
      "train",
      [CONFIG, "--workdir=x", "--config.optimizer.peak_lr=fast"],
      "--config.optimizer.peak_lr=fast",
    ),
    (
      "train",
      ["--config=configs/arflow.py:digit", "--workdir=x"],
      "unknown variant 'digit'",
    ),
    ("train", ["--config=nope.py", "--workdir=x"], "nope.py"),
    (
      "train",
      [CONFIG, "--workdir=x", "--config.model.patch_size=3"],
      "model.patch_size=3 does not divide the image size 8",
    ),
    (
      "train",
      [CONFIG, "--workdir=x", "--config.data.sequence_length=200"],
      "fewer than data.sequence_length=200",
    ),
    (
      "train",
      [CONFIG, f"--workdir={TINY_RUN}"],
      f"{TINY_RUN} holds a run of another config",
    ),
    ("sample", ["--workdir=x"], "--out is required"),
    ("sample", ["--out=x.png"], "--workdir is required"),
    (
      "sample",
      ["--workdir=absent", "--out=x.png"],
      "--workdir=absent holds no checkpoint",
    ),
    (
      "sample",
      [f"--workdir={TINY_RUN}", "--out=absent.png", "--labels=0-12"],
      "labels [11, 12] are out of range",
    ),
    (
      "sample",
      [f"--workdir={TINY_RUN}", f"--out={TINY_RUN}.npz"],
      "exists; choose another or add --overwrite",
    ),
    (
      "evaluate",
      [f"--workdir={TINY_RUN}", "--guidance=1,high"],
      "--guidance=['1', 'high']",
    ),
    (
      "evaluate",
      [f"--workdir={TINY_RUN}", "--guidance=-1"],
      "guidance=-1.0 must not be negative",
    ),
  ],
)
def test_bad_input_is_one_clear_line(main, args, message):
  done = _run(main, *args)
  assert done.returncode in (1, 2)
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert lines[0].startswith("error: ")
  assert message in lines[0]


def test_a_diverging_run_is_one_clear_line(tmp_path):
  args = flags(optimizer__peak_lr=1e30, optimizer__warmup_steps=0, log__every=1)
  done = _run("train", *args, f"--workdir={tmp_path}")
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert "at step" in done.stderr
  assert "checkpoint" in done.stderr


@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_train_then_sample(family, tmp_path):
  run = tmp_path / "run"
  done = _run("train", *flags(family), f"--workdir={run}")
  assert done.returncode == 0, done.stderr
  assert "finished 4 steps" in done.stdout
  assert "images/s" in done.stdout
  out = run / "samples.png"
  done = _run(
    "sample",
    f"--workdir={run}",
    "--labels=0-9",
    "--per_label=2",
    "--guidance=1.5",
    f"--out={out}",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == str(out)
  assert "20/20" in done.stderr  # the progress bar
  assert out.stat().st_size > 0


def test_bench_prints_keeps_and_compares(tmp_path):
  out = tmp_path / "kept" / "a.json"
  done = _run("bench", *flags(), f"--out={out}")
  assert done.returncode == 0, done.stderr
  for row in (
    "compile time",
    "step time (median)",
    "images/s",
    "share of its rate",
    "peak memory",
    "input wait",
  ):
    assert row in done.stdout
  done = _run("bench", *flags(), "--what=sample", f"--out={out}")
  assert done.returncode == 1
  assert "exists; give --overwrite" in done.stderr
  done = _run("bench", *flags(), "--what=sample", f"--compare={out}")
  assert done.returncode == 0, done.stderr
  head, _, ratios = done.stdout.partition("this run / the other")
  assert "train" not in head
  assert "step_time" in ratios
  assert "train" not in ratios
