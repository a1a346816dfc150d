#!/usr/bin/env bash
# A TPU VM by queued resources (v5e, v5p, v6e), and a main on all its workers:
#
#   tpu_vm.sh create NAME --zone=ZONE --type=v5litepod-256 [--spot] [FLAGS]
#   tpu_vm.sh run    NAME train --config=... --workdir=gs://BUCKET/RUN
#   tpu_vm.sh logs   NAME     worker 0's log until the main ends
#   tpu_vm.sh status NAME
#   tpu_vm.sh resume NAME     the same main again until it has finished, on a
#                             new machine where this one is preempted or stuck
#   tpu_vm.sh stop   NAME     the main saves and ends; the machine stays
#   tpu_vm.sh delete NAME     that, then the machine
#
# --dry_run after NAME prints every command and runs none. `run` takes any main.
# Other FLAGS go to `gcloud compute tpus queued-resources create`. What was made
# and run is noted in runs/tpu_vm/NAME for the calls that follow. Exit codes are
# the main's; launch/README.md says more.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/job.sh

PAUSE=${PAUSE:-30} # seconds between two looks at a machine
PATIENCE=${PATIENCE:-20} # looks at one that is neither ready nor gone
RESTARTS=${RESTARTS:-50} # the most that one `resume` starts the main anew

fail() {
  echo "error: $2" >&2
  exit "$1"
}

case ${1:-} in
  create | run | logs | status | resume | stop | delete) verb=$1 ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' launch/tpu_vm.sh >&2
    exit 2
    ;;
esac
name=${2:-}
case $name in
  '' | -* | *[!a-z0-9-]*)
    fail 2 "$verb needs the NAME of a machine, of a-z, 0-9 and -" ;;
esac
shift 2

# What earlier calls have noted, then what this one says.
notes=runs/tpu_vm/$name
zone='' project='' type='' dry_run='' flags=() main=()
if [ -f "$notes" ] && [ "$verb" != create ]; then
  # shellcheck source=/dev/null
  source "$notes"
fi
while [ $# -gt 0 ]; do
  case $verb,$1 in
    *,--dry_run | *,--dry-run) dry_run=1 ;;
    *,--zone=*) zone=${1#*=} ;;
    *,--project=*) project=${1#*=} ;;
    create,--type=*) type=${1#*=} ;;
    create,--*) flags+=("$1") ;;
    run,[!-]*)
      main=("$@")
      break
      ;;
    *) fail 2 "$verb does not take $1; see bash launch/tpu_vm.sh" ;;
  esac
  shift
done
[ -n "$zone" ] || fail 2 "--zone=ZONE is needed, such as --zone=us-west4-a"
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
case $verb,${#main[@]} in
  run,0 | resume,0)
    fail 2 "$verb needs a main: tpu_vm.sh run $name train --config=..." ;;
esac
check_workdir ${main[@]+"${main[@]}"}

# https://cloud.google.com/tpu/docs/runtimes
case $type in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    case $verb in
      create | resume)
        fail 2 "--type=$type is none of v5litepod-CHIPS, v5p-CORES and \
v6e-CHIPS; TPU7x is served through GKE, by launch/gke.sh" ;;
    esac
    ;;
esac

note() {
  [ -z "$dry_run" ] || return 0
  mkdir -p "${notes%/*}"
  declare -p zone project type flags main >"$notes"
}

tpus() { do_it gcloud compute tpus "$@" "${where[@]}"; }

ssh_to() { tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2"; }

# on WORKERS VERB...: launch/worker.sh on them, in their copies of this
# checkout.
on() { ssh_to "$1" "$(quoted bash arflow_jax/launch/worker.sh "${@:2}")"; }

ask_codes() {
  ssh_to all 'bash arflow_jax/launch/worker.sh code || echo code=none'
}

# The exit code of the main on each worker, or `running`, or `none`; nothing
# where no worker answers.
codes() { ask_codes | sed -n 's/^code=//p' || true; }

describe() {
  local kind=$1 errors
  errors=$(mktemp)
  if gcloud compute tpus "$kind" describe "$name" "${where[@]}" \
    "--format=value($2)" 2>"$errors"; then
    :
  elif grep -q NOT_FOUND "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    echo SILENT
  fi
  rm -f "$errors"
}

# The machine's state where the request is ACTIVE, else the request's; NONE
# where there is no request, SILENT where the cloud does not say.
state() {
  local said
  said=$(describe queued-resources state.state)
  if [ "$said" = ACTIVE ]; then
    said=$(describe tpu-vm state)
    [ "$said" != NONE ] || said=PREEMPTED
  fi
  echo "$said"
}

# Waits until the machine can be used. Fails where this one never will.
await() {
  local now before='' looks=0
  if [ -n "$dry_run" ]; then
    tpus queued-resources describe "$name" '--format=value(state.state)'
    tpus tpu-vm describe "$name" '--format=value(state)'
    return
  fi
  while :; do
    now=$(state)
    [ "$now" = "$before" ] || echo "$name: $now" >&2
    before=$now
    case $now in
      READY) return ;;
      WAITING_FOR_RESOURCES | ACCEPTED | CREATING | PROVISIONING) looks=0 ;;
      SILENT | *ING) looks=$((looks + 1)) ;;
      *) return 1 ;;
    esac
    if [ "$looks" -ge "$PATIENCE" ]; then
      [ "$now" != SILENT ] ||
        fail 1 "the state of $name cannot be read; nothing was changed"
      return 1
    fi
    sleep "$PAUSE"
  done
}

ask() {
  tpus queued-resources create "$name" "--node-id=$name" \
    "--accelerator-type=$type" "--runtime-version=$runtime" \
    ${flags[@]+"${flags[@]}"}
}

# A new machine in the place of one that is preempted, stuck or gone.
renew() {
  if [ -n "$dry_run" ] || [ "$(state)" != NONE ]; then
    tpus queued-resources delete "$name" --force --quiet
  fi
  ask && await
}

# This checkout to all workers, as it is, and what it needs; then the main.
start() {
  local archive=runs/tpu_vm/$name.tgz parts='arflow_jax configs launch'
  # shellcheck disable=SC2086
  do_it tar -czf "$archive" --exclude=__pycache__ $parts README.md \
    pyproject.toml requirements.txt &&
    tpus tpu-vm scp "$archive" "$name:arflow_jax.tgz" --worker=all &&
    ssh_to all "mkdir -p arflow_jax && cd arflow_jax && rm -rf $parts && \
tar -xzf ../arflow_jax.tgz && EXTRAS=tpu bash launch/worker.sh install" &&
    on all start "${main[@]}"
}

# Shows worker 0's log until the main has ended on all workers, and sets `code`
# to the job's. Fails where no worker answers.
follow() {
  local all looks=0 since
  while :; do
    since=$SECONDS
    on 0 follow || true
    if [ -n "$dry_run" ]; then
      ask_codes
      return
    fi
    all=$(codes)
    case $all in
      '') return 1 ;;
      *running*) ;;
      *)
        # shellcheck disable=SC2086
        code=$(verdict ${all//none/255})
        return
        ;;
    esac
    # The connection was lost, or worker 0 has ended before the others.
    [ $((SECONDS - since)) -lt 60 ] || looks=0
    looks=$((looks + 1))
    [ "$looks" -lt "$PATIENCE" ] || on all stop || true
    sleep "$PAUSE"
  done
}

# Goes on until the main has finished, failed for good, or been started anew too
# often; sets `code`.
resume() {
  local all starts=0 troubles=0
  while [ "$troubles" -lt "$PATIENCE" ] && [ "$starts" -le "$RESTARTS" ]; do
    sleep "$((starts + troubles > 0 ? PAUSE : 0))"
    if ! await && ! renew; then
      troubles=$((troubles + 1))
      continue
    fi
    all=$(codes)
    case $all in
      '') # ready, but no worker can be reached
        troubles=$((troubles + 1))
        [ "$troubles" -ne $((PATIENCE / 2)) ] || renew || true
        continue
        ;;
      *running*) ;;
      *[!0[:space:]]*)
        starts=$((starts + 1))
        if ! start; then
          troubles=$((troubles + 1))
          continue
        fi
        ;;
      *)
        code=0
        return
        ;;
    esac
    troubles=0 code=255
    follow || true
    resumes "$code" || return 0
    echo "$name: the main ended with $code, start $starts" >&2
  done
  fail 42 "$name: given up; the same command goes on"
}

# The braces: bash reads all of it now, also if this file is changed meanwhile.
{
  trap 'echo "the main goes on; logs shows it, stop ends it" >&2; exit 130' INT
  code=0
  reason="gcloud compute tpus queued-resources describe $name ${where[*]}"
  case $verb in
    create)
      ask
      note
      await || fail 1 "$name cannot be had; see $reason"
      ;;
    run)
      [ -z "$dry_run" ] || ask_codes
      case $([ -n "$dry_run" ] || codes) in
        *running*) fail 1 "$name is at work: logs shows it, stop ends it" ;;
      esac
      note
      start
      follow || code=255
      ;;
    logs) follow || code=255 ;;
    status)
      if [ -n "$dry_run" ]; then
        await
        ask_codes
      else
        now=$(state)
        echo "$name: $now"
        [ "$now" != READY ] ||
          echo "main on each worker: $(codes | paste -s -d ' ' -)"
      fi
      ;;
    resume)
      if [ -n "$dry_run" ]; then
        await
        echo "# where it is preempted, stuck or gone:"
        renew
        echo "# where the main is not at work:"
        start
        follow
      else
        resume
      fi
      ;;
    stop) on all stop ;;
    delete)
      if [ -n "$dry_run" ] || [ "$(state)" = READY ]; then
        on all stop || true
      fi
      tpus queued-resources delete "$name" --force --quiet
      [ -n "$dry_run" ] || rm -f "$notes" "$notes.tgz"
      ;;
  esac
  case $verb in
    run | logs)
      ! resumes "$code" ||
        echo "ended with $code; to go on: tpu_vm.sh resume $name" >&2
      ;;
  esac
  exit "$code"
}
