"""The mains, called with arguments: help, one-line errors, whole commands."""

import os
import pathlib
import subprocess
import sys

import pytest

from arflow_jax import (
  bench,
  bench_attention,
  cli,
  evaluate,
  preflight,
  report,
  sample,
  train,
  verify,
)
from arflow_jax.analysis import benchmark
from tests import test_flags, test_signals
from tests.tiny import flags

MAINS = [
  train,
  sample,
  evaluate,
  report,
  bench,
  bench_attention,
  preflight,
  verify,
]
CONFIG = "--config=configs/arflow.py:digits"
ROOT = pathlib.Path(__file__).parents[1]
TINY_RUN = str(ROOT / "tests" / "sampling" / "tiny_run")


def _python(*args, cwd):
  return subprocess.run(
    [sys.executable, *args],
    capture_output=True,
    text=True,
    check=False,
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )


@pytest.mark.parametrize("main", MAINS, ids=lambda main: main.__name__)
def test_help_names_the_command_and_every_flag(main, capsys):
  assert cli.execute(main, ["--help"]) == 0
  out = capsys.readouterr().out
  assert f"python -m {main.__name__}" in out
  assert "flags:" in out
  assert "(required)" in out or main is bench_attention
  assert "(default " in out or main in (train, verify)


def test_no_main_is_left_out():
  """Of what holds all mains against a table."""
  paths = ROOT.glob("arflow_jax/*.py")
  names = {path.stem for path in paths if "cli.run(" in path.read_text()}
  short = lambda mains: {main.__name__.rpartition(".")[2] for main in mains}
  assert short(MAINS) == names
  assert short(test_flags.COMMANDS) == names
  assert set(test_signals.COMMANDS) == names


@pytest.mark.parametrize("main", MAINS, ids=lambda main: main.__name__)
def test_help_survives_a_reader_who_leaves(main, tmp_path):
  """As in `--help | head -1`."""
  command = f"{sys.executable} -m {main.__name__} --help | head -1"
  done = subprocess.run(
    ["bash", "-o", "pipefail", "-c", command],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert len(done.stdout.splitlines()) == 1


def test_help_and_flags_import_nothing_heavy(tmp_path):
  """All mains at once, in a Python of their own."""
  names = ", ".join(main.__name__.partition(".")[2] for main in MAINS)
  program = f"""
import sys
from arflow_jax import cli, {names}

for main in ({names}):
  assert cli.execute(main, ["-h"]) == 0
  own = cli.Flags()
  main.define(own)
  given = ["--config=configs/flowar.py:digits", "--workdir=x", "--out=x"]
  given.append("--topology=v5e")
  assert own.parse([f for f in given if f.split("=")[0] in own.help()])
heavy = {{"jax", "flax", "tensorflow", "sklearn", "orbax", "grain"}}
print("imported", heavy & set(sys.modules))
"""
  done = _python("-c", program, cwd=tmp_path)
  assert done.stderr == ""
  assert done.stdout.splitlines()[-1] == "imported set()"


def test_a_command_exits_with_the_code(tmp_path):
  """From a folder without configs, which are found beside the package."""
  done = _python("-m", "arflow_jax.train", "--help", cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, "")
  assert "python -m arflow_jax.train" in done.stdout
  done = _python("-m", "arflow_jax.train", CONFIG, "--seed=1", cwd=tmp_path)
  assert done.returncode == 2
  assert done.stderr.splitlines() == [
    "error: unknown flag --seed; did you mean --config.seed?"
  ]


USAGE_ERRORS = [
  (train, [CONFIG], "--workdir is required"),
  (train, ["--workdir=x"], "--config is required"),
  (train, [CONFIG, "--workdir="], "--workdir is required"),
  (train, [CONFIG, "--workdri=x"], "--workdri; did you mean --workdir?"),
  (train, [CONFIG, "--workdir=x", "y"], "unexpected argument 'y'"),
  (train, [CONFIG, "--workdir=x", "--config.seed"], "Missing value"),
  (
    train,
    [CONFIG, "--config.optimizer.peek_lr=1"],
    "unknown flag --config.optimizer.peek_lr;"
    " did you mean --config.optimizer.peak_lr?",
  ),
  (
    train,
    [CONFIG, "--config.optimizer.lr=1"],
    "--config.optimizer.lr; did you mean --config.optimizer.peak_lr?",
  ),
  (
    train,
    [CONFIG, "--config.optimzer.peak_lr", "1"],
    "--config.optimzer.peak_lr; did you mean --config.optimizer.peak_lr?",
  ),
  (train, [CONFIG, "--config.foo=1"], "unknown flag --config.foo"),
  (train, [CONFIG, "--config.model=x"], "--config.model: it is a group; set"),
  (train, ["--config.steps=3", "--workdir=x"], "--config is required"),
  *(
    (main, [f"--workdir={TINY_RUN}", "--config.steps=3"], "; --set=KEY=VALUE")
    for main in (sample, evaluate)
  ),
  (
    train,
    [CONFIG, "--optimizer.peak_lr=1"],
    "--optimizer.peak_lr; did you mean --config.optimizer.peak_lr?",
  ),
  (
    train,
    [CONFIG, "--config.optimizer.peak_lr=fast"],
    "--config.optimizer.peak_lr=fast",
  ),
  (train, [CONFIG, "--config.steps=1e5"], "--config.steps=1e5"),
  (train, [CONFIG, "--config.batch_size=None"], "--config.batch_size=None"),
  (
    train,
    [CONFIG, "--config.data.flip=maybe"],
    "--config.data.flip=maybe: 'maybe' is neither true nor false",
  ),
  (train, ["--config=configs/arflow.py:digit"], "unknown variant 'digit'"),
  (train, ["--config=nope.py"], "nope.py does not exist"),
  (train, ["--config=README.md"], "README.md is no Python file"),
  (sample, ["--workdir=x"], "--out is required"),
  (sample, ["--out=x.png"], "--workdir is required"),
  (sample, ["--workdir=x", "--out=y", "--seed=-1"], "--seed=-1"),
]
ERRORS = [
  (bench, [CONFIG, "--what=train,smaple"], "--what=smaple is unknown"),
  (bench, [CONFIG, "--compare=none.json"], "--compare=none.json is no"),
  (bench, [CONFIG, "--out=speed.txt"], "--out=speed.txt must end in .json"),
  (
    bench_attention,
    ["--sizes=XXL"],
    "--sizes=XXL is unknown; choose from ['S', 'B', 'L', 'XL']",
  ),
  (bench_attention, ["--sizes="], "--sizes= is unknown; choose from ['S', 'B'"),
  (bench_attention, ["--tokens=99999999"], "--tokens=99999999 is more than"),
  (
    bench_attention,
    ["--tokens=many"],
    "--tokens=many must be positive whole numbers, such as --tokens=256,64",
  ),
  (
    bench_attention,
    ["--step_batch=100"],
    "--step_batch=100 is not a multiple of 256",
  ),
  *(
    (preflight, [CONFIG, f"--topology={name}"], f"--topology={name}{wrong}")
    for name, wrong in {
      "v5e:3x3": ": v5e has the slices 2x2, 2x4, 4x4,",
      "v5:2x2": " is unknown; did you mean v5",
      "v5p:": ": v5p has the slices 2x2x1,",
      "gpu:80": ": give the memory of one GPU, such as gpu:80GB",
      "gpu:0GB": ": give the memory of one GPU",
    }.items()
  ),
  (
    preflight,
    [CONFIG, "--topology=gpu:80GB", "--config.mesh.fsdp=2"],
    "mesh.fsdp=2 x mesh.tensor=1 does not make 1 devices",
  ),
  (
    preflight,
    [CONFIG, "--topology=gpu:80GB", "--config.optimizer.accumulation=5"],
    "optimizer.accumulation=5 does not divide batch_size=12",
  ),
  (
    preflight,
    [CONFIG, "--topology=gpu:80GB", "--out=fits.txt"],
    "--out=fits.txt must end in .json",
  ),
  (train, [CONFIG, "--workdir=README.md"], "README.md is a file; move it away"),
  (
    train,
    [CONFIG, "--workdir=README.md/x"],
    "--workdir=README.md/x cannot be written",
  ),
  (bench, [CONFIG, "--out=README.md/x.json"], "--out=README.md/x.json cannot"),
  (
    bench_attention,
    ["--out=README.md/x.json"],
    "--out=README.md/x.json cannot",
  ),
  (train, [CONFIG, "--workdir=x", "--config.seed=-1"], "seed=-1"),
  (
    train,
    [CONFIG, "--workdir=x", "--config.model.patch_size=3"],
    "model.patch_size=3 does not divide the image size 8",
  ),
  (
    train,
    [*flags(), "--workdir=x", "--config.data.sequence_length=200"],
    "fewer than data.sequence_length=200",
  ),
  (
    train,
    [CONFIG, f"--workdir={TINY_RUN}"],
    f"{TINY_RUN} holds a run of another config",
  ),
  (
    sample,
    ["--workdir=absent", "--out=x.png"],
    "--workdir=absent holds no checkpoint",
  ),
  (
    sample,
    [f"--workdir={TINY_RUN}", "--out=absent.png", "--labels=0-12"],
    "labels [11, 12] are out of range",
  ),
  (
    sample,
    [f"--workdir={TINY_RUN}", f"--out={TINY_RUN}.npz"],
    "exists; choose another or add --overwrite",
  ),
  (
    sample,
    [f"--workdir={TINY_RUN}", "--out=absent.png", "--set=num_steps"],
    "--set=num_steps must look like --set=KEY=VALUE",
  ),
  (
    sample,
    [f"--workdir={TINY_RUN}", "--out=absent.png", "--set=block_size=True"],
    "sample.block_size=True: it takes a number",
  ),
  (
    sample,
    [f"--workdir={TINY_RUN}", "--out=absent.png", "--set=guidance={}"],
    "sample.guidance={}: ",
  ),
  (
    sample,
    ["--workdir=x", "--out=x.npz", "--per_label=100000000000"],
    "--per_label=100000000000 of 10 labels is more than 10,000,000 images",
  ),
  (sample, ["--workdir=x", "--out=.png"], "--out=.png must end in .png"),
  *(
    (
      train,
      [CONFIG, "--workdir=x", f"--config.data.source={source}"],
      f"data.source='{source}' is unknown; choose digits, tfds:NAME or random",
    )
    for source in ("digit", "tfds:", "random:3")
  ),
  (
    train,
    [CONFIG, "--workdir=x", "--config.branch=None"],
    "branch=None is unknown",
  ),
  (report, ["--workdir=absent"], "--workdir=absent holds no run"),
  (
    report,
    [f"--workdir={TINY_RUN}", "--out=page.txt"],
    "--out=page.txt must be a file that ends in .html",
  ),
  (evaluate, [f"--workdir={TINY_RUN}", "--guidance="], "names no scale"),
  (
    evaluate,
    [f"--workdir={TINY_RUN}", "--guidance=1,high"],
    "--guidance=['1', 'high']",
  ),
  (
    evaluate,
    [f"--workdir={TINY_RUN}", "--guidance=-1"],
    "guidance=-1.0 must be a number in [0, 100]",
  ),
]


@pytest.mark.parametrize(
  ("code", "main", "args", "message"),
  [(2, *row) for row in USAGE_ERRORS] + [(1, *row) for row in ERRORS],
)
def test_bad_input_is_one_clear_line(code, main, args, message, capsys):
  assert cli.execute(main, args) == code
  err = capsys.readouterr().err
  (line,) = err.splitlines()
  assert line.startswith("error: ")
  assert message in line


@pytest.mark.parametrize(
  ("family", "changes"),
  [
    ("arflow", {}),
    pytest.param(
      "flowar",
      {"model__patch_size": 4, "model__scales": (1, 2)},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_train_then_sample(family, changes, tmp_path, capsys):
  run = tmp_path / "run"
  args = [*flags(family, **changes), f"--workdir={run}"]
  assert cli.execute(train, args) == 0
  out = capsys.readouterr().out
  assert "finished 4 steps" in out
  assert "images/s" in out
  assert out.splitlines()[-1] == f"its curves are in {run}/report.html"
  sheet = run / "samples.png"
  args = [f"--workdir={run}", "--labels=0-9", "--per_label=2"]
  assert cli.execute(sample, [*args, "--guidance=1.5", f"--out={sheet}"]) == 0
  out, err = capsys.readouterr()
  assert out.splitlines()[-1] == str(sheet)
  assert "20/20" in err  # the progress bar
  assert sheet.stat().st_size > 0


def test_bench_prints_keeps_and_compares(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(benchmark, "product_side", lambda: 64)
  out = tmp_path / "kept" / "a.json"
  assert cli.execute(bench, [*flags(), f"--out={out}"]) == 0
  printed = capsys.readouterr().out
  for row in (
    "compile time",
    "step time (median)",
    "images/s",
    "share of its rate",
    "peak memory",
    "input wait",
    "digits",  # where its batches come from
  ):
    assert row in printed
  assert printed.splitlines()[-1] == str(out)
  only = [*flags(), "--what=sample"]
  assert cli.execute(bench, [*only, f"--out={out}"]) == 1
  assert "exists; give --overwrite" in capsys.readouterr().err
  assert cli.execute(bench, [*only, f"--compare={out}"]) == 0
  head, _, ratios = capsys.readouterr().out.partition("this run / the other")
  assert "train" not in head
  assert "step_time" in ratios
  assert "train" not in ratios
