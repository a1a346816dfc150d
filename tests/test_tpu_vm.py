"""launch/tpu_vm.sh, with a cloud of two workers that lives in a folder.

Its `gcloud` writes down the calls and runs what is sent to a worker in that
worker's own home, with a stand-in for Python; it can preempt and fail.
"""

import pathlib
import shutil
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
GCLOUD = """#!/usr/bin/env bash
# compute tpus KIND VERB NAME [SOURCE|FLAGS...]
echo "gcloud $*" >>"$CLOUD/calls"
shift 2
state=$(cat "$CLOUD/state" 2>/dev/null)
call="$1 $2"
worker=0 command='' from=$PWD
for argument in "$@"; do
  case $argument in
    --worker=all) worker='0 1' ;;
    --command=*) command=${argument#*=} ;;
  esac
done
case $call in
  "queued-resources create")
    mkdir -p "$CLOUD/0" "$CLOUD/1"
    echo WAITING_FOR_RESOURCES >"$CLOUD/state"
    ;;
  "queued-resources delete") rm -rf "$CLOUD/state" "$CLOUD/0" "$CLOUD/1" ;;
  "queued-resources describe")
    case $state in
      '') echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1 ;;
      BROKEN) echo "ERROR: no network" >&2; exit 1 ;;
      READY) echo ACTIVE ;;
      *) echo "$state" ;;
    esac
    [ "$state" != WAITING_FOR_RESOURCES ] || echo READY >"$CLOUD/state"
    ;;
  "tpu-vm describe") echo "$state" ;;
  *)
    [ "$state" = READY ] || { echo "ERROR: $state" >&2; exit 1; }
    for i in $worker; do
      cd "$CLOUD/$i" || exit 1
      case $call in
        "tpu-vm scp") cp "$from/$3" "${4#*:}" ;;
        "tpu-vm ssh") HOME=$PWD bash -c "$command" || code=$? ;;
      esac
    done
    exit ${code:-0}
    ;;
esac
"""
# plan.0 and plan.1 hold what the main does on each worker at each start: an
# exit code, `preempt`, or `wait`, which is until SIGTERM.
PYTHON = """#!/usr/bin/env bash
plan=$CLOUD/plan.$(basename "$HOME")
case "$*" in
  "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install "*) echo "pip ${*: -1}" >>"$CLOUD/calls" ;;
  "-m arflow_jax."*)
    echo "$* cache=$JAX_COMPILATION_CACHE_DIR" | tee -a "$CLOUD/mains"
    turn=0
    read -r turn <"$plan"
    sed -i 1d "$plan"
    case $turn in
      preempt) echo PREEMPTED >"$CLOUD/state"; exit 137 ;;
      wait)
        trap 'exit 42' TERM
        while :; do sleep 0.1; done
        ;;
      *) exit "${turn:-0}" ;;
    esac
    ;;
esac
"""
MAIN = ("train", "--config=configs/x.py", "--workdir=gs://bucket/run")
CREATE = ("--zone=z", "--type=v5litepod-16", "--project=p", "--spot")


class Cloud:
  """A cloud without machines, and a checkout to launch from."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder / "cloud"
    self.repo = folder / "repo"
    tools = folder / "tools"
    self.folder.mkdir()
    tools.mkdir()
    self.repo.mkdir()
    shutil.copytree(ROOT / "launch", self.repo / "launch")
    for name in ("arflow_jax", "configs"):
      (self.repo / name).mkdir()
    for name in ("requirements.txt", "pyproject.toml", "README.md"):
      shutil.copy(ROOT / name, self.repo)
    for name, text in {
      "gcloud": GCLOUD,
      "python3": PYTHON,
      "sudo": "#!/bin/sh\ncat >/dev/null\n",
    }.items():
      (tools / name).write_text(text)
      (tools / name).chmod(0o755)
    self.environment = {
      "PATH": f"{tools}:/usr/bin:/bin",
      "HOME": str(self.repo),
      "CLOUD": str(self.folder),
      "PAUSE": "0",
      "PATIENCE": "4",
    }
    self.plan()

  def plan(self, *turns: str) -> None:
    """What the main does on both workers, start by start."""
    for worker in range(2):
      (self.folder / f"plan.{worker}").write_text(
        "".join(f"{t}\n" for t in turns)
      )

  def __call__(self, *args: str, **environment: str):
    return subprocess.run(
      ["bash", "launch/tpu_vm.sh", *args],
      cwd=self.repo,
      env=self.environment | environment,
      capture_output=True,
      text=True,
      check=False,
      timeout=100,
    )

  def read(self, name: str) -> str:
    path = self.folder / name
    return path.read_text() if path.exists() else ""

  def calls(self, kind: str) -> int:
    """How often gcloud was called for this, such as "delete"."""
    return self.read("calls").count(
      f"gcloud compute tpus queued-resources {kind}"
    )


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


def _runs(cloud, *turns, **environment):
  """Creates a machine and runs a main that does this."""
  done = cloud("create", "pod", *CREATE)
  assert done.returncode == 0, done.stderr
  cloud.plan(*turns)
  return cloud("run", "pod", *MAIN, **environment)


@pytest.mark.slow
def test_a_main_runs_on_all_workers_and_its_log_is_shown(cloud):
  done = _runs(cloud, "0")
  assert done.returncode == 0, done.stderr
  line = "-m arflow_jax.train --config=configs/x.py --workdir=gs://bucket/run"
  assert cloud.read("mains") == f"{line} cache=gs://bucket/compiled\n" * 2
  assert f"{line} cache" in done.stdout
  calls = cloud.read("calls")
  assert calls.count("pip .[tpu]") == 2
  assert (
    "create pod --node-id=pod --accelerator-type=v5litepod-16"
    " --runtime-version=v2-alpha-tpuv5-lite --spot --zone=z --project=p"
  ) in calls
  assert cloud.calls("delete") == 0


@pytest.mark.slow
def test_another_main_installs_nothing_anew(cloud):
  assert _runs(cloud, "0", "0").returncode == 0
  assert (
    cloud("status", "pod").stdout == "pod: READY\nmain on each worker: 0 0\n"
  )
  done = cloud("run", "pod", "sample", "--workdir=gs://bucket/run")
  assert done.returncode == 0, done.stderr
  assert cloud.read("mains").count("arflow_jax.sample") == 2
  assert cloud.read("calls").count("pip .[tpu]") == 2


@pytest.mark.slow
@pytest.mark.parametrize("code", ["42", "134", "137"])
def test_a_stopped_main_is_resumed_until_it_has_finished(cloud, code):
  done = _runs(cloud, code, code, "0")
  assert done.returncode == int(code)
  assert "to go on: tpu_vm.sh resume pod" in done.stderr
  done = cloud("resume", "pod")
  assert done.returncode == 0, done.stderr
  assert cloud.read("mains").count("arflow_jax.train") == 6
  assert cloud.calls("delete") == 0


@pytest.mark.slow
def test_a_preempted_machine_is_made_anew(cloud):
  done = _runs(cloud, "preempt", "preempt", "0")
  assert done.returncode == 255
  before = cloud.read("calls")
  done = cloud("resume", "pod", "--dry_run")
  assert "# where it is preempted, stuck or gone:\ngcloud" in done.stdout
  assert cloud.read("calls") == before
  done = cloud("resume", "pod")
  assert done.returncode == 0, done.stderr
  assert cloud.calls("delete pod --force") == cloud.calls("create pod") - 1 >= 1
  assert cloud.read("calls").count("delete") == cloud.calls("delete pod")


@pytest.mark.slow
def test_a_machine_that_is_ready_and_mute_is_made_anew(cloud):
  _runs(cloud, "42", "0")
  for worker in "01":  # nobody is at home there
    (cloud.folder / worker).rename(cloud.folder / f"gone.{worker}")
  done = cloud("resume", "pod")
  assert done.returncode == 0, done.stderr
  assert cloud.calls("delete pod --force") == cloud.calls("create pod") - 1 == 1


@pytest.mark.slow
def test_a_worker_with_an_old_python_gets_a_newer_one(cloud, tmp_path):
  tools = tmp_path / "tools"
  (tools / "python3").rename(tools / "python3.12")
  (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
  (tools / "uv").write_text(
    f'#!/bin/sh\necho "uv $*" >>"$CLOUD/calls"; echo {tools}/python3.12\n'
  )
  for name in ("python3", "uv"):
    (tools / name).chmod(0o755)
  done = _runs(cloud, "0")
  assert done.returncode == 0, done.stderr
  assert cloud.read("calls").count("uv python install 3.12") == 2
  assert cloud.read("mains").count("train") == 2


@pytest.mark.slow
def test_an_error_is_not_tried_again(cloud):
  # The worker with the error takes the other down.
  assert cloud("create", "pod", *CREATE).returncode == 0
  (cloud.folder / "plan.0").write_text("134\n134\n")
  (cloud.folder / "plan.1").write_text("1\n1\n")
  done = cloud("run", "pod", *MAIN)
  assert done.returncode == 1
  done = cloud("resume", "pod")
  assert done.returncode == 1
  assert cloud.read("mains").count("arflow_jax.train") == 4


@pytest.mark.slow
def test_a_main_that_never_finishes_is_given_up(cloud):
  _runs(cloud, *["42"] * 9)
  done = cloud("resume", "pod", RESTARTS="1")
  assert done.returncode == 42
  assert "given up" in done.stderr
  assert cloud.read("mains").count("arflow_jax.train") == 2 * 3


@pytest.mark.slow
def test_stop_saves_and_a_second_main_is_refused_meanwhile(cloud):
  assert cloud("create", "pod", *CREATE).returncode == 0
  cloud.plan("wait")
  with subprocess.Popen(
    ["bash", "launch/tpu_vm.sh", "run", "pod", *MAIN],
    cwd=cloud.repo,
    env=cloud.environment,
    stderr=subprocess.PIPE,
    text=True,
  ) as first:
    end = time.monotonic() + 60
    while cloud.read("mains").count("train") < 2:
      assert time.monotonic() < end
      time.sleep(0.1)
    done = cloud("run", "pod", "sample")
    assert done.returncode == 1
    assert "pod is at work: logs shows it, stop ends it" in done.stderr
    assert cloud("stop", "pod").returncode == 0
    assert first.wait(60) == 42
  notes = (cloud.repo / "runs" / "tpu_vm" / "pod").read_text()
  assert "sample" not in notes


@pytest.mark.slow
def test_delete_names_one_machine(cloud):
  _runs(cloud, "0")
  assert cloud("delete", "pod").returncode == 0
  assert cloud.calls("delete pod --force --quiet --zone=z --project=p") == 1
  assert cloud.calls("delete") == 1
  assert "--zone=ZONE is needed" in cloud("status", "pod").stderr


@pytest.mark.slow
def test_nothing_is_deleted_while_the_cloud_does_not_answer(cloud):
  _runs(cloud, "42", "0")
  (cloud.folder / "state").write_text("BROKEN\n")
  done = cloud("resume", "pod")
  assert done.returncode == 1
  assert "no network" in done.stderr
  assert "cannot be read; nothing was changed" in done.stderr
  assert cloud.calls("delete") == 0


def test_a_dry_run_prints_commands_and_runs_none(cloud):
  done = cloud("create", "pod", *CREATE, "--dry_run")
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(
    "gcloud compute tpus queued-resources create pod --node-id=pod"
  )
  done = cloud(
    "run", "pod", "--zone=z", "--dry_run", "train", "--workdir=/x/y z"
  )
  assert done.returncode == 0, done.stderr
  verbs = [line.split()[4] for line in done.stdout.splitlines()]
  assert verbs == ["ssh", "arflow_jax", "scp", "ssh", "ssh", "ssh", "ssh"]
  assert cloud.read("calls") == ""
  assert not (cloud.repo / "runs").exists()


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["create"], "create needs the NAME of a machine"),
    (["create", "Pod"], "create needs the NAME of a machine"),
    (["create", "pod", "--type=v6e-8"], "--zone=ZONE is needed"),
    (["create", "pod", "--zone=z"], "--type= is none of v5litepod-CHIPS"),
    (["create", "pod", "--zone=z", "--type=tpu7x-8"], "GKE, by launch/gke.sh"),
    (["run", "pod", "--zone=z"], "run needs a main"),
    (["run", "pod", "--zone=z", "--spot", "train"], "run does not take --spot"),
    (["resume", "pod", "--zone=z"], "resume needs a main"),
    (
      ["run", "pod", "--zone=z", "train", "--workdir=runs/x"],
      "--workdir=runs/x would lie on the machines' own disks",
    ),
  ],
)
def test_what_cannot_work_is_refused_in_one_line(cloud, args, message):
  done = cloud(*args)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert cloud.read("calls") == ""
