#!/usr/bin/env bash
# The main job on this machine: trains (or goes on with) a run, restores its
# checkpoint and draws WORKDIR/samples.png anew. All else goes to the trainer:
#
#   bash launch/local.sh
#   bash launch/local.sh --config=configs/arflow.py:digits --workdir=runs/x
#   bash launch/local.sh --processes=2
#
# A relative workdir lies in the folder where the command is typed. The exit
# code is the trainer's (42: stopped and saved, the same command goes on), or
# 130 after Ctrl-C. With --processes=N the GPUs are shared out among N
# processes; process 0 prints here, the others into WORKDIR/process_1.log and so
# on, and if one dies the others are stopped. --dry_run prints the commands and
# runs none.
set -euo pipefail
typed_in=$PWD
launch=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$launch/job.sh"

config=configs/arflow.py:digits
workdir=runs/digits
processes=1 dry_run='' help='' rest=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | -help | --help | --helpshort) help=1 ;;
    -config=* | --config=*) config=${1#*=} ;;
    -workdir=* | --workdir=*) workdir=${1#*=} ;;
    -processes=* | --processes=*) processes=${1#*=} ;;
    --dry_run | --dry-run) dry_run=1 ;;
    -config | --config | -workdir | --workdir | -processes | --processes)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      case $1 in
        *config) config=$2 ;;
        *workdir) workdir=$2 ;;
        *) processes=$2 ;;
      esac
      shift
      ;;
    *) rest+=("$1") ;;
  esac
  shift
done
case $processes in
  '' | *[!0-9]* | 0*)
    echo "error: --processes=$processes is no number from 1" >&2
    exit 2
    ;;
esac

# The GPUs, where several processes have to share them.
gpus=()
if [ "$processes" -gt 1 ] && [ "${JAX_PLATFORMS:-}" != cpu ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    found=$CUDA_VISIBLE_DEVICES
  else
    found=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null |
      paste -s -d , - || true)
  fi
  IFS=, read -ra gpus <<<"$found"
  if [ $((${#gpus[@]} % processes)) -ne 0 ]; then
    echo "error: --processes=$processes: ${#gpus[@]} GPUs cannot be shared" \
      "out evenly" >&2
    exit 2
  fi
fi

if [ -z "$dry_run" ]; then
  source "$launch/common.sh"
fi
cd "$launch/.."
if [ -n "$help" ]; then
  exec .venv/bin/python -m arflow_jax.train --help
fi

case $workdir in
  /* | *://* | '~'*) ;;
  *) workdir=$typed_in/$workdir ;;
esac
file=${config%%:*}
case $file in
  /* | '~'*) ;;
  *) [ ! -f "$typed_in/$file" ] || config=$typed_in/$config ;;
esac
logs=$workdir
case $logs in *://* | '~'*) logs=runs/local ;; esac
source "$launch/flags.sh" "--workdir=$workdir"

# The braces: bash reads all of it now, also if this file is changed meanwhile.
{
  # In the background, so that a signal to this script reaches the trainers,
  # which save before they stop; nothing is drawn then.
  trainers=() codes=() left=0 stopped='' interrupted=''
  signal() { kill "-$1" ${trainers[@]+"${trainers[@]}"} 2>/dev/null || true; }
  trap 'stopped=1; signal TERM' TERM HUP
  trap 'stopped=1 interrupted=1; signal TERM' INT

  address=localhost:PORT
  if [ "$processes" -gt 1 ] && [ -z "$dry_run" ]; then
    mkdir -p "$logs"
    address=localhost:$(.venv/bin/python -c 'import socket
port = socket.create_server(("", 0))
print(port.getsockname()[1])')
  fi
  for ((i = 0; i < processes; i++)); do
    settings=()
    if [ "$processes" -gt 1 ]; then
      settings=(env "JAX_COORDINATOR_ADDRESS=$address"
        "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i")
    fi
    if [ "${#gpus[@]}" -gt 0 ]; then
      share=$((${#gpus[@]} / processes))
      mine=$(IFS=, && echo "${gpus[*]:i * share:share}")
      settings+=("CUDA_VISIBLE_DEVICES=$mine")
    fi
    command=(${settings[@]+"${settings[@]}"}
      .venv/bin/python -m arflow_jax.train "--config=$config"
      "--workdir=$workdir" ${rest[@]+"${rest[@]}"})
    if [ -n "$dry_run" ]; then
      quoted "${command[@]}"
      continue
    elif [ "$i" -eq 0 ]; then
      "${command[@]}" &
    else
      "${command[@]}" >"$logs/process_$i.log" 2>&1 &
    fi
    trainers[i]=$! codes[i]='' left=$((left + 1))
  done

  [ -z "$stopped" ] || signal TERM # it came before all had been started

  # Where one ends badly, the others are given some time: after 42 they are
  # about to end as well, after all else they wait for it in vain.
  failed='' first=0
  while [ "$left" -gt 0 ]; do
    for ((i = 0; i < processes; i++)); do
      if [ -n "${codes[i]}" ] || kill -0 "${trainers[i]}" 2>/dev/null; then
        continue
      fi
      codes[i]=0 left=$((left - 1))
      wait "${trainers[i]}" || codes[i]=$?
      if [ "${codes[i]}" -ne 0 ] && [ -z "$failed" ]; then
        failed=$SECONDS first=${codes[i]} patience=10
        if [ "${codes[i]}" -eq 42 ]; then
          patience=60
        elif [ "$processes" -gt 1 ]; then
          echo "process $i ended with ${codes[i]}; the others are stopped" >&2
          [ "$i" -eq 0 ] || tail -n 3 "$logs/process_$i.log" >&2
          signal TERM
        fi
      fi
    done
    if [ -n "$failed" ] && [ $((SECONDS - failed)) -gt "$patience" ]; then
      signal KILL
    fi
    [ "$left" -eq 0 ] || sleep 0.1
  done
  code=$(verdict "$first" ${codes[@]+"${codes[@]}"})
  [ -z "$interrupted" ] || exit 130
  [ "$code" -eq 0 ] || exit "$code"
  trap - TERM INT HUP

  command=(.venv/bin/python -m arflow_jax.sample "--workdir=$workdir"
    --labels=0-9 --per_label=10 "--out=$workdir/samples.png" --overwrite)
  if [ -n "$dry_run" ]; then
    quoted "${command[@]}"
  else
    "${command[@]}"
  fi
  exit
}
