"""Every flag of every main against values that make no sense."""

import functools
import pathlib

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
from arflow_jax import config as config_lib
from arflow_jax.analysis import attention_bench, benchmark
from arflow_jax.analysis import preflight as examination
from arflow_jax.metrics import page, pixels
from arflow_jax.sampling import images, run
from arflow_jax.training import program, verification
from tests.tiny import tiny_config

TINY_RUN = pathlib.Path(__file__).parent / "sampling" / "tiny_run"
CONFIG = "--config=configs/arflow.py:digits"
COMMANDS = {
  train: [CONFIG, "--workdir={folder}/new"],
  sample: [f"--workdir={TINY_RUN}", "--out={folder}/x.npz"],
  evaluate: [f"--workdir={TINY_RUN}"],
  bench: [CONFIG],
  bench_attention: [],
  preflight: [CONFIG, "--topology=gpu:80GB"],
  report: [f"--workdir={TINY_RUN}", "--out={folder}/x.html"],
  verify: [f"--workdir={TINY_RUN}"],
}
# By the type of a flag, as absl calls it.
BAD = {
  "int": ("0", "-1", f"{10**30}", "nan", "", "1.5", "²", "None"),
  "float": ("-1", "nan", "inf", "1e38", "", "high", "None"),
  "bool": ("maybe", "2", ""),
  "string enum": ("nonsense", ""),
  "comma separated list of strings": ("nonsense", "-1", "nan", "1e38", "²", ""),
  "multi string": (
    "nonsense",
    "nonsense=1",
    "=1",
    "num_steps=0",
    f"num_steps={10**12}",
    "num_steps=None",
    "guidance=1e38",
    "guidance=nan",
    "method=",
    "",
  ),
  "string": ("nonsense", "README.md/x", ""),
}
LABELS = ("-1", "0-", "0-9999999999", "0-²", "3-1", "99", "0,,1")
# What is allowed, and why.
ALLOWED = {
  (train, "workdir"): {"nonsense": "a new folder"},
  (sample, "seed"): {"0": "a seed as good as any"},
  (sample, "out"): {"nonsense": "a new folder"},
  (evaluate, "seed"): {"0": "a seed as good as any"},
  (report, "out"): {"": "in the workdir"},
  (bench, "out"): {"": "nothing is kept"},
  (bench, "compare"): {"": "nothing is compared"},
  (bench_attention, "out"): {"": "nothing is kept"},
  (preflight, "out"): {"": "nothing is kept"},
  (bench_attention, "implementations"): {"": "all that can run here"},
}


class _Reached(Exception):
  """The work would begin."""


@pytest.fixture(autouse=True)
def _no_work(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "README.md").touch()

  def reached(*args, **kwargs):
    raise _Reached

  monkeypatch.setattr(program, "build", reached)
  monkeypatch.setattr(images.Generator, "blocks", reached)
  monkeypatch.setattr(pixels, "Recogniser", reached)
  monkeypatch.setattr(benchmark, "_train_speed", reached)
  monkeypatch.setattr(attention_bench, "_product_rate", reached)
  monkeypatch.setattr(examination, "examine", reached)
  monkeypatch.setattr(verification, "damage", reached)
  monkeypatch.setattr(page, "_page", reached)
  monkeypatch.setattr(run, "restore", functools.cache(run.restore))


def _flags(main):
  """Names of its flags, found by walking them, with values to try."""
  own = cli.Flags()
  main.define(own)
  for name in own._values:
    if name not in ("help", "h"):
      bad = BAD[own._values[name].flag_type()]
      yield name, bad + LABELS * (name == "labels")


@pytest.mark.parametrize("main", COMMANDS, ids=lambda main: main.__name__)
def test_values_that_make_no_sense_are_refused_by_flag(main, tmp_path, capsys):
  given = [text.format(folder=tmp_path) for text in COMMANDS[main]]
  with pytest.raises(_Reached):
    cli.execute(main, given)
  capsys.readouterr()
  wrong = []
  for name, values in _flags(main):
    for value in values:
      try:
        code = cli.execute(main, [*given, f"--{name}={value}"])
      except _Reached:
        code = 0
      errors = capsys.readouterr().err
      named = name in errors or (name == "set" and "sample." in errors)
      refused = code in (1, 2) and named and len(errors.splitlines()) == 1
      if refused == (value in ALLOWED.get((main, name), {})):
        wrong.append((name, value, code, errors))
  assert not wrong


@pytest.mark.parametrize("family", ["arflow", "flowar"])
def test_text_for_a_number_is_refused_by_flag(family, capsys):
  """Every key of a config whose values are no text."""
  config = tiny_config(family)
  wrong = []
  for key in config_lib.flatten(config.to_dict()):
    if config_lib.key_type(config, key) in (int, float, bool):
      for value in ("text", "", "²", "1,2"):
        file = f"--config=configs/{family}.py:digits"
        flag = f"--config.{key}={value}"
        code = cli.execute(train, [file, "--workdir=x", flag])
        line = capsys.readouterr().err
        if code != 2 or flag not in line or len(line.splitlines()) != 1:
          wrong.append((key, value, code, line))
  assert not wrong
