#!/usr/bin/env bash
# The main job on this machine: trains (or goes on with) a run, restores its
# checkpoint and draws WORKDIR/samples.png. All arguments go to the trainer:
#
#   bash launch/local.sh
#   bash launch/local.sh --config=configs/arflow.py:digits --workdir=runs/x
set -euo pipefail
trap 'exit 130' INT
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

config=configs/arflow.py:digits
workdir=runs/digits
rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --config | --workdir)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      [ "$1" = --config ] && config=$2 || workdir=$2
      shift
      ;;
    *) rest+=("$1") ;;
  esac
  shift
done

.venv/bin/python -m arflow_jax.train --config="$config" --workdir="$workdir" \
  ${rest[@]+"${rest[@]}"}
.venv/bin/python -m arflow_jax.sample --workdir="$workdir" --labels=0-9 \
  --per_label=10 --out="$workdir/samples.png" --overwrite
