"""launch/gke.sh and launch/slurm.sbatch, with stand-ins for XPK and SLURM."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RECORD = """#!/usr/bin/env bash
{ printf '%s' "${0##*/}"; printf ' <%s>' "$@"; echo; } >>"$LOG"
exit "${FAILS:-0}"
"""
# Runs two tasks side by side, as SLURM does, and returns the highest code;
# where TIME_LIMIT is set, both get SIGTERM first.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
while [ "${1:0:2}" = -- ]; do shift; done
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
if [ -n "${TIME_LIMIT:-}" ]; then
  until [ "$(grep -c '^main' "$LOG")" = 2 ]; do sleep 0.05; done
  kill -TERM "$first" "$second"
fi
one=0 two=0
wait "$first" || one=$?
wait "$second" || two=$?
exit $((one > two ? one : two))
"""
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install "*) echo "pip ${*: -1}" >>"$LOG" ;;
  "-m arflow_jax."*)
    SHARE=$XLA_PYTHON_CLIENT_MEM_FRACTION
    if [ -n "${TIME_LIMIT:-}" ]; then
      trap 'exit 42' TERM
      echo "main $* flags=$XLA_FLAGS $SHARE" >>"$LOG"
      while :; do sleep 0.05; done
    fi
    echo "main $* flags=$XLA_FLAGS $SHARE" >>"$LOG"
    codes=(${CODES:-0 0})
    exit "${codes[SLURM_PROCID]}"
    ;;
esac
"""
TASK = ("train", "--config=configs/x.py", "--workdir=/shared/run")


@pytest.fixture
def launch(tmp_path):
  """A checkout, and the programs of the clusters in its PATH."""
  repo, tools = tmp_path / "repo", tmp_path / "tools"
  shutil.copytree(ROOT / "launch", repo / "launch")
  for name in ("requirements.txt", "pyproject.toml"):
    shutil.copy(ROOT / name, repo)
  tools.mkdir()
  for name in ("xpk", "kubectl", "scontrol", "srun", "python3"):
    text = {"srun": SRUN, "python3": PYTHON}.get(name, RECORD)
    (tools / name).write_text(text)
    (tools / name).chmod(0o755)

  def run(script, *args, **environment):
    (tmp_path / "log").write_text("")
    done = subprocess.run(
      ["bash", f"launch/{script}", *args],
      env={"PATH": f"{tools}:/usr/bin:/bin", "LOG": str(tmp_path / "log")}
      | environment,
      cwd=repo,
      capture_output=True,
      text=True,
      check=False,
      timeout=60,
    )
    return done, (tmp_path / "log").read_text()

  return run


def _sbatch(launch, *args, **environment):
  given = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_GPUS_ON_NODE": "2",
  }
  return launch("slurm.sbatch", *args, **(given | environment))


def test_gke_creates_a_workload_that_restarts(launch):
  flags = ("--cluster=c", "--tpu-type=tpu7x-4x4x4", "--zone=z", "--spot")
  main = ("sample", "--workdir=gs://b/r", "--labels=0-9", "--out=gs://b/a b")
  done, calls = launch("gke.sh", "create", "one", *flags, "--", *main)
  assert done.returncode == 0, done.stderr
  assert calls == (
    "xpk <workload> <create> <--workload=one> <--tpu-type=tpu7x-4x4x4>"
    " <--max-restarts=50> <--restart-on-exit-codes=42>"
    " <--termination-grace-period-seconds=120> <--script-dir=.> <--cluster=c>"
    " <--zone=z> <--spot> <--base-docker-image=python:3.12>"
    " <--command=export EXTRAS=tpu && exec bash launch/worker.sh run sample"
    " --workdir=gs://b/r --labels=0-9 '--out=gs://b/a b'>\n"
  )
  ignored = (ROOT / ".dockerignore").read_text().split()
  assert {".git", ".venv", "runs"} <= set(ignored)


def test_gke_takes_an_image_and_passes_a_failure_on(launch):
  flags = ("--cluster=c", "--tpu-type=v6e-16", "--docker-image=own")
  done, calls = launch(
    "gke.sh", "create", "one", *flags, "--", "train", FAILS="3"
  )
  assert done.returncode == 3
  assert "<--docker-image=own> <--command=" in calls


@pytest.mark.parametrize(
  ("verb", "call"),
  [
    ("status", "xpk <workload> <list> <--filter-by-job=one> <--cluster=c>\n"),
    ("delete", "xpk <workload> <delete> <--workload=one> <--cluster=c>\n"),
  ],
)
def test_gke_asks_for_one_workload(launch, verb, call):
  assert launch("gke.sh", verb, "one", "--cluster=c")[1] == call
  done, calls = launch("gke.sh", verb, "one", "--cluster=c", "--dry_run")
  assert calls == ""
  assert done.stdout == call.replace("<", "").replace(">", "")


def test_gke_shows_the_log_of_worker_0(launch):
  _, calls = launch("gke.sh", "logs", "one", "--cluster=c")
  assert calls.startswith("kubectl <logs> <--follow> <--tail=-1>")
  assert "jobset-name=one," in calls
  assert "job-completion-index=0>" in calls


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["delete", "--cluster=c"], "delete needs the NAME of a workload"),
    (["delete"], "delete needs the NAME of a workload"),
    (["status", "one"], "--cluster=NAME is needed"),
    (["create", "one", "--cluster=c", "--", "train"], "needs --tpu-type"),
    (["create", "one", "--cluster=c", "train"], "flags look like --name=value"),
    (
      [
        "create",
        "one",
        "--cluster=c",
        "--tpu-type=x",
        "--",
        "train",
        "--workdir=r",
      ],
      "--workdir=r would lie on the machines' own disks",
    ),
  ],
)
def test_gke_refuses_in_one_line(launch, args, message):
  done, calls = launch("gke.sh", *args)
  assert (done.returncode, calls) == (2, "")
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_slurm_installs_once_and_runs_all_tasks(launch):
  done, calls = _sbatch(launch, *TASK)
  assert done.returncode == 0, done.stderr
  assert calls.count("pip .[cuda]") == 1
  main = "main -m arflow_jax.train --config=configs/x.py --workdir=/shared/run"
  flag = "--xla_gpu_enable_latency_hiding_scheduler=true"
  assert calls.count(f"{main} flags={flag} .92\n") == 2
  assert "srun --kill-on-bad-exit=0 --wait=60 --gpu-bind=none bash" in calls
  assert "scontrol" not in calls


@pytest.mark.parametrize(
  ("codes", "code", "again"),
  [
    ("42 42", 42, 1),
    ("134 42", 42, 1),
    ("134 134", 134, 1),
    ("134 1", 1, 0),
    ("2 2", 2, 0),
  ],
)
def test_slurm_queues_again_what_can_go_on(launch, codes, code, again):
  done, calls = _sbatch(launch, *TASK, CODES=codes)
  assert done.returncode == code, done.stderr
  assert calls.count("scontrol <requeue> <7>") == again
  done, calls = _sbatch(launch, *TASK, CODES=codes, SLURM_RESTART_COUNT="50")
  assert done.returncode == code
  assert "scontrol" not in calls


def test_slurm_tasks_save_at_the_time_limit(launch):
  done, calls = _sbatch(launch, *TASK, TIME_LIMIT="1")
  assert done.returncode == 42, done.stderr
  assert calls.count("scontrol <requeue> <7>") == 1
  assert "#SBATCH --signal=TERM@" in (ROOT / "launch/slurm.sbatch").read_text()


def test_slurm_dry_run(launch):
  done, calls = _sbatch(launch, "--dry_run", *TASK)
  assert (done.returncode, calls) == (0, "")
  assert [line.split()[0] for line in done.stdout.splitlines()] == [
    "bash",
    "srun",
    "#",
    "scontrol",
  ]


def test_slurm_refuses_in_one_line(launch):
  done, calls = _sbatch(launch)
  assert done.returncode == 2
  assert "name a main" in done.stderr
  done, calls = _sbatch(launch, *TASK, SLURM_NTASKS_PER_NODE="1")
  assert (done.returncode, calls) == (2, "")
  assert "1 tasks and 2 GPUs a node" in done.stderr
