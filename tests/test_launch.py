"""The launchers, with a stand-in for Python that writes down its calls."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
STUB = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
  "-m venv --clear .venv")
    [ -z "${FAIL_VENV:-}" ] || exit 1
    mkdir -p .venv/bin && cp "$0" .venv/bin/python
    ;;
  "-c "*) [ -z "${OLD:-}" ] || exit 1 ;;
  *arflow_jax.train*) exit "${TRAIN_CODE:-0}" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
  shutil.copytree(ROOT / "launch", tmp_path / "repo" / "launch")
  shutil.copy(ROOT / "requirements.txt", tmp_path / "repo")
  stub = tmp_path / "python"
  stub.write_text(STUB)
  stub.chmod(0o755)

  def run(*args, **environment):
    log = tmp_path / "log"
    log.write_text("")
    paths = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "LOG": str(log)}
    done = subprocess.run(
      ["bash", str(tmp_path / "repo" / "launch" / "local.sh"), *args],
      env=paths | environment,
      capture_output=True,
      text=True,
      check=False,
    )
    return done, log.read_text()

  return run


def test_installs_once_trains_and_draws(launch):
  done, calls = launch()
  assert done.returncode == 0, done.stderr
  assert calls.count("pip install") == 1
  train, sample = calls.splitlines()[-2:]
  assert "--config=configs/arflow.py:digits --workdir=runs/digits" in train
  assert "--out=runs/digits/samples.png" in sample
  done, calls = launch()
  assert "pip install" not in calls
  assert "venv" not in calls


def test_arguments_reach_the_trainer(launch):
  _, calls = launch("--workdir", "runs/a b", "--config.optimizer.peak_lr=1e-3")
  train, sample = calls.splitlines()[-2:]
  assert "--workdir=runs/a b --config.optimizer.peak_lr=1e-3" in train
  assert "--workdir=runs/a b" in sample


def test_nothing_is_drawn_after_a_failed_training(launch):
  done, calls = launch(TRAIN_CODE="1")
  assert done.returncode == 1
  assert "arflow_jax.sample" not in calls


def test_a_failed_environment_is_made_again(launch):
  done, _ = launch(FAIL_VENV="1")
  assert done.returncode == 1
  assert "cannot make .venv" in done.stderr
  done, calls = launch()
  assert done.returncode == 0
  assert calls.count("pip install") == 1


def test_an_old_python_is_refused(launch):
  done, _ = launch(OLD="1")
  assert done.returncode != 0
  assert "set PYTHON=" in done.stderr


def test_help_draws_nothing(launch):
  _, calls = launch("--help")
  assert "arflow_jax.train --help" in calls
  assert "arflow_jax.sample" not in calls
