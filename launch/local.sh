#!/usr/bin/env bash
# The main job on this machine: trains (or goes on with) a run, restores its
# checkpoint and draws WORKDIR/samples.png anew. All arguments go to the trainer:
#
#   bash launch/local.sh
#   bash launch/local.sh --config=configs/arflow.py:digits --workdir=runs/x
#
# A relative workdir lies in the folder where the command is typed. The exit code
# is the trainer's (42: stopped and saved, the same command goes on), or 130
# after Ctrl-C.
set -euo pipefail
typed_in=$PWD
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

config=configs/arflow.py:digits
workdir=runs/digits
rest=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | -help | --help | --helpshort)
      exec .venv/bin/python -m arflow_jax.train --help
      ;;
    -config=* | --config=*) config=${1#*=} ;;
    -workdir=* | --workdir=*) workdir=${1#*=} ;;
    -config | --config | -workdir | --workdir)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      case $1 in *config) config=$2 ;; *) workdir=$2 ;; esac
      shift
      ;;
    *) rest+=("$1") ;;
  esac
  shift
done

case $workdir in
  /* | *://* | '~'*) ;;
  *) workdir=$typed_in/$workdir ;;
esac
file=${config%%:*}
case $file in
  /* | '~'*) ;;
  *) [ ! -f "$typed_in/$file" ] || config=$typed_in/$config ;;
esac

# In the background, so that a signal to this script reaches the trainer, which
# saves before it stops; nothing is drawn then.
.venv/bin/python -m arflow_jax.train --config="$config" --workdir="$workdir" \
  ${rest[@]+"${rest[@]}"} &
trainer=$!
interrupted=''
trap 'again=1; kill -TERM "$trainer" 2>/dev/null' TERM
trap 'again=1 interrupted=1; kill -TERM "$trainer" 2>/dev/null' INT
again=1
while [ -n "$again" ]; do  # a trap ends a wait without the trainer's code
  again='' code=0
  wait "$trainer" || code=$?
done
[ -z "$interrupted" ] || exit 130
[ "$code" -eq 0 ] || exit "$code"
trap - TERM INT

.venv/bin/python -m arflow_jax.sample --workdir="$workdir" --labels=0-9 \
  --per_label=10 --out="$workdir/samples.png" --overwrite
