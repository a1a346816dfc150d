"""The launchers, with a stand-in for Python that writes down its calls."""

import pathlib
import shutil
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
STUB = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
  "-m venv --clear .venv")
    [ -z "${FAIL_VENV:-}" ] || exit 1
    mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/ruff
    ;;
  "-c import socket"*) echo 1234 ;;
  "-c "*) [ -z "${OLD:-}" ] || exit 1 ;;
  *arflow_jax.train*)
    if [ -n "${JAX_PROCESS_ID:-}" ]; then
      me="process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES"
      at="at $JAX_COORDINATOR_ADDRESS on ${CUDA_VISIBLE_DEVICES:-}"
      echo "$me $at" >>"$LOG"
      echo "hello from $me"
      if [ -n "${DIES:-}" ] && [ "$DIES" != "$JAX_PROCESS_ID" ]; then
        trap 'exit 42' TERM
        for _ in $(seq 100); do sleep 0.1; done
      fi
      sleep 0.3  # until the others wait for their signal
    fi
    if [ -n "${SIGNAL:-}" ]; then
      trap 'exit 42' TERM
      kill -"$SIGNAL" "$PPID"
      for _ in $(seq 100); do sleep 0.1; done
    fi
    exit "${TRAIN_CODE:-0}"
    ;;
esac
"""


@pytest.fixture
def repo(tmp_path):
  """A checkout as far as the launchers need one."""
  shutil.copytree(ROOT / "launch", tmp_path / "repo" / "launch")
  for name in ("requirements.txt", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path / "repo")
  return tmp_path / "repo"


@pytest.fixture
def launch(repo, tmp_path):
  # Where the tests run in the background SIGINT is ignored, and a shell cannot
  # catch what was ignored when it began.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  stub = tmp_path / "python"
  stub.write_text(STUB)
  stub.chmod(0o755)

  def run(*args, script="local.sh", **environment):
    log = tmp_path / "log"
    log.write_text("")
    paths = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "LOG": str(log)}
    done = subprocess.run(
      ["bash", str(repo / "launch" / script), *args],
      env=paths | environment,
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    return done, log.read_text()

  yield run
  signal.signal(signal.SIGINT, before)


def _installed(calls):
  """What pip was told to install, call by call."""
  lines = calls.splitlines()
  return [line.split()[-1] for line in lines if "pip install" in line]


def test_installs_once_trains_and_draws(launch):
  done, calls = launch()
  assert done.returncode == 0, done.stderr
  assert _installed(calls) == ["."]
  train, sample = calls.splitlines()[-2:]
  here = f"{ROOT}/runs/digits"
  assert f"--config={ROOT}/configs/arflow.py:digits --workdir={here}" in train
  assert f"--out={here}/samples.png" in sample
  done, calls = launch()
  assert _installed(calls) == []
  assert "venv" not in calls


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_installs_again_when_a_list_changes(launch, repo, name):
  launch()
  with (repo / name).open("a") as file:
    file.write("# changed\n")
  assert _installed(launch()[1]) == ["."]
  assert _installed(launch()[1]) == []


def test_extras_are_added_and_stay(launch):
  assert _installed(launch(EXTRAS="tpu cuda")[1]) == [".[cuda,tpu]"]
  assert _installed(launch()[1]) == []
  done, calls = launch("-k", "one", script="test.sh")
  assert done.returncode == 0, done.stderr
  assert _installed(calls) == [".[cuda,test,tpu]"]
  assert _installed(launch()[1]) == []


def test_an_unknown_extra_is_refused(launch):
  done, calls = launch(EXTRAS="gpu")
  assert done.returncode == 2
  assert "EXTRAS=gpu is unknown; choose from tpu and cuda" in done.stderr
  assert _installed(calls) == []
  assert launch()[0].returncode == 0


def test_the_test_command_checks_and_runs_what_is_asked_for(launch):
  done, calls = launch("--all", "-k", "one", script="test.sh")
  assert done.returncode == 0, done.stderr
  assert calls.splitlines()[-3:] == [
    "check .",
    "format --check .",
    "-m pytest -n 2 --dist worksteal -m slow or not slow -k one",
  ]
  assert launch(script="test.sh")[1].splitlines()[-1] == (
    "-m pytest -n 2 --dist worksteal"
  )


def test_arguments_reach_the_trainer(launch):
  _, calls = launch("--workdir", "runs/a b", "--config.optimizer.peak_lr=1e-3")
  train, sample = calls.splitlines()[-2:]
  assert f"--workdir={ROOT}/runs/a b --config.optimizer.peak_lr=1e-3" in train
  assert f"--workdir={ROOT}/runs/a b" in sample


@pytest.mark.parametrize("workdir", ["/x/y", "~/x", "gs://bucket/x"])
def test_a_whole_path_stays_as_it_is(launch, workdir):
  _, calls = launch(f"--workdir={workdir}", "--config=own.py")
  train = calls.splitlines()[-2]
  assert f"--config=own.py --workdir={workdir}" in train


@pytest.mark.parametrize("code", [1, 2, 42])
def test_nothing_is_drawn_unless_training_is_finished(launch, code):
  done, calls = launch(TRAIN_CODE=str(code))
  assert done.returncode == code
  assert "arflow_jax.sample" not in calls


@pytest.mark.parametrize(
  ("number", "code"), [("TERM", 42), ("INT", 130), ("HUP", 42)]
)
def test_a_signal_reaches_the_trainer_and_its_code_comes_back(
  launch, number, code
):
  # The stand-in sends it to the script, its parent, and stops as trainers do.
  done, calls = launch(TRAIN_CODE="42", SIGNAL=number)
  assert done.returncode == code, done.stderr
  assert "arflow_jax.sample" not in calls


def test_several_processes_share_the_gpus(launch, tmp_path):
  workdir = tmp_path / "run"
  args = (f"--workdir={workdir}", "--processes=2")
  done, calls = launch(*args, CUDA_VISIBLE_DEVICES="0,1,2,3")
  assert done.returncode == 0, done.stderr
  told = sorted(line for line in calls.splitlines() if line[:7] == "process")
  assert told == [
    "process 0 of 2 at localhost:1234 on 0,1",
    "process 1 of 2 at localhost:1234 on 2,3",
  ]
  assert done.stdout.count("hello from process 0") == 1
  assert "process 1" not in done.stdout
  assert (
    workdir / "process_1.log"
  ).read_text() == "hello from process 1 of 2\n"
  assert calls.count("arflow_jax.sample") == 1


@pytest.mark.parametrize(
  ("dies", "code", "whole"),
  [("1", "1", 1), ("0", "3", 3), ("1", "137", 42), ("1", "134", 42)],
)
def test_if_one_process_dies_the_others_are_stopped(
  launch, tmp_path, dies, code, whole
):
  args = (f"--workdir={tmp_path / 'run'}", "--processes", "3")
  done, calls = launch(*args, DIES=dies, TRAIN_CODE=code)
  assert done.returncode == whole, done.stderr
  assert f"process {dies} ended with {code}; the others are" in done.stderr
  assert ("hello from process 1 of 3" in done.stderr) == (dies == "1")
  assert "arflow_jax.sample" not in calls


@pytest.mark.parametrize("number", ["0", "two", "-1", "", "3"])
def test_a_number_of_processes_that_cannot_be_is_refused(launch, number):
  done, calls = launch(f"--processes={number}", CUDA_VISIBLE_DEVICES="0,1,2,3")
  assert done.returncode == 2
  assert f"--processes={number}" in done.stderr
  assert calls == ""


def test_a_dry_run_prints_what_would_run(launch):
  done, calls = launch("--dry_run", "--workdir=/x y", "--config.steps=3")
  assert (done.returncode, calls) == (0, "")
  train, sample = done.stdout.splitlines()
  assert train == (
    f".venv/bin/python -m arflow_jax.train"
    f" --config={ROOT}/configs/arflow.py:digits '--workdir=/x y'"
    " --config.steps=3"
  )
  assert "arflow_jax.sample '--workdir=/x y'" in sample
  done, _ = launch("--dry_run", "--processes=2", CUDA_VISIBLE_DEVICES="5,7")
  first, second, _ = done.stdout.splitlines()
  assert first.startswith(
    "env JAX_COORDINATOR_ADDRESS=localhost:PORT JAX_NUM_PROCESSES=2"
    " JAX_PROCESS_ID=0 CUDA_VISIBLE_DEVICES=5 .venv/bin/python -m"
  )
  assert "JAX_PROCESS_ID=1 CUDA_VISIBLE_DEVICES=7" in second


@pytest.mark.parametrize(
  ("codes", "whole"),
  [
    ("0 0", 0),
    ("0 42", 42),
    ("134 42 0", 42),
    ("134 1 42", 1),
    ("137 134", 137),
    ("0 126 2", 126),
  ],
)
def test_the_exit_code_of_a_job(codes, whole):
  script = f"source {ROOT}/launch/job.sh; verdict {codes}"
  assert subprocess.check_output(["bash", "-c", script]) == b"%d\n" % whole


def test_a_failed_environment_is_made_again(launch):
  done, _ = launch(FAIL_VENV="1")
  assert done.returncode == 1
  assert "cannot make .venv" in done.stderr
  done, calls = launch()
  assert done.returncode == 0
  assert _installed(calls) == ["."]


def test_an_old_python_is_refused(launch):
  done, _ = launch(OLD="1")
  assert done.returncode != 0
  assert "set PYTHON=" in done.stderr


def test_every_script_can_be_parsed():
  scripts = [*(ROOT / "launch").glob("*.s*")]
  assert len(scripts) >= 4
  for script in scripts:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck_finds_nothing():
  done = subprocess.run(
    ["shellcheck", "-x", "-P", "launch", *(ROOT / "launch").glob("*.s*")],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout == ""


def test_help_draws_nothing(launch):
  _, calls = launch("--help")
  assert "arflow_jax.train --help" in calls
  assert "arflow_jax.sample" not in calls
