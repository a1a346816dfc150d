#!/usr/bin/env bash
# What every worker of a job does, in its own copy of this checkout. The other
# launchers call it; it is not meant for typing.
#
#   worker.sh install                   makes .venv and fills it
#   worker.sh run MAIN ARGUMENTS...     that, then becomes the main
#   worker.sh task FILE MAIN ...        the same; its exit code goes to FILE
#   worker.sh start MAIN ARGUMENTS...   the same, detached from the terminal
#   worker.sh follow                    its log until it ends; its exit code
#   worker.sh code                      code=N, code=running or code=none
#   worker.sh stop                      SIGTERM: it saves and ends
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
job=runs/job  # of the detached main: its log, process number and exit code

install() {
  # The images of TPU VMs come with Python 3.10; uv brings a newer one.
  local new_enough='import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'
  if ! [ -x .venv/bin/python ] && ! python3 -c "$new_enough" 2>/dev/null; then
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv python install 3.12
    PYTHON=$(uv python find 3.12)
    export PYTHON
  fi
  bash -euo pipefail launch/common.sh
  # JAX asks for huge pages on TPU v5e and later.
  if [ "${EXTRAS:-}" = tpu ] && command -v sudo >/dev/null; then
    echo always |
      sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null || true
  fi
}

running() {
  ! [ -f "$job/code" ] && kill -0 "$(cat "$job/process")"
} 2>/dev/null

code() {
  if [ -f "$job/code" ]; then
    cat "$job/code"
  elif running; then
    echo running
  else
    echo none
  fi
}

case ${1:-} in
  install) install ;;
  run)
    shift
    install
    source launch/flags.sh
    main=$1
    shift
    # In the shell's place, so that a signal to it reaches the main.
    exec .venv/bin/python -m "arflow_jax.$main" "$@"
    ;;
  task)
    codes=$2
    shift 2
    # In the background, so that a signal to this shell is passed on at once.
    bash launch/worker.sh run "$@" &
    main=$!
    trap 'again=1; kill -TERM "$main" 2>/dev/null' TERM
    again=1
    while [ -n "$again" ]; do # a trap ends a wait without the main's code
      again='' code=0
      wait "$main" || code=$?
    done
    echo "$code" >>"$codes"
    exit "$code"
    ;;
  start)
    if running; then
      echo "error: a main is at work on $(hostname); stop it first" >&2
      exit 1
    fi
    shift
    rm -rf "$job" && mkdir -p "$job"
    # A group of its own: `stop` signals all of it, and the shell, which has to
    # write down the exit code, outlives the signal.
    # shellcheck disable=SC2016
    setsid bash -c 'trap : TERM
      bash launch/worker.sh run "$@" >"$0/log" 2>&1 && code=0 || code=$?
      echo "$code" >"$0/code.new" && mv "$0/code.new" "$0/code"' \
      "$job" "$@" </dev/null >/dev/null 2>&1 &
    echo $! >"$job/process"
    ;;
  follow)
    if ! [ -f "$job/process" ]; then
      echo "error: no main has been started on $(hostname)" >&2
      exit 1
    fi
    tail --pid="$(cat "$job/process")" -s 0.5 -n +1 -F "$job/log" 2>/dev/null
    echo "code=$(code)"
    ;;
  code) echo "code=$(code)" ;;
  stop)
    running || exit 0
    # Also those that the main has started, which leave the signal to it.
    kill -TERM -- "-$(cat "$job/process")"
    for _ in $(seq 120); do running && sleep 1; done
    ! running
    ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' launch/worker.sh >&2
    exit 2
    ;;
esac
