#!/usr/bin/env bash
# A main on GKE through XPK (v5e to TPU7x), on a cluster that XPK has made:
#
#   gke.sh create NAME --cluster=C --tpu-type=tpu7x-4x4x4 [FLAGS] -- \
#     train --config=... --workdir=gs://BUCKET/RUN
#   gke.sh status NAME --cluster=C [FLAGS]
#   gke.sh logs   NAME --cluster=C     worker 0's log
#   gke.sh delete NAME --cluster=C [FLAGS]
#
# --dry_run prints every command and runs none. Other FLAGS, such as --zone=Z,
# --project=P, --num-slices=2 and --spot, go to xpk. GKE starts the workload
# again after a preemption and after exit code 42, up to --max-restarts=50.
# launch/README.md says more.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/job.sh

case ${1:-} in
  create | status | logs | delete) verb=$1 ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' launch/gke.sh >&2
    exit 2
    ;;
esac
name=${2:-}
case $name in
  [!a-z]* | '' | *[!a-z0-9-]*)
    # `xpk workload delete` without a name would delete all workloads.
    echo "error: $verb needs the NAME of a workload, of a-z, 0-9 and -" >&2
    exit 2
    ;;
esac
shift 2

dry_run='' cluster='' type='' restarts=50 flags=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run | --dry-run) dry_run=1 ;;
    --cluster=*) cluster=${1#*=} ;;
    --tpu-type=*) type=${1#*=} ;;
    --max-restarts=*) restarts=${1#*=} ;;
    --) shift && break ;;
    --*) flags+=("$1") ;;
    *)
      echo "error: $1: flags look like --name=value, and -- stands before" \
        "the main" >&2
      exit 2
      ;;
  esac
  shift
done
if [ -z "$cluster" ]; then
  echo "error: --cluster=NAME is needed" >&2
  exit 2
fi
rest=("--cluster=$cluster" ${flags[@]+"${flags[@]}"})

case $verb in
  create)
    if [ -z "$type" ] || [ $# -eq 0 ]; then
      echo "error: create needs --tpu-type=..., and a main after --" >&2
      exit 2
    fi
    check_workdir "$@"
    # XPK runs the command in a shell below the one that gets SIGTERM; exec puts
    # the main where the signal arrives. The default image's Python is too old.
    case " ${rest[*]}" in
      *' --docker-image='* | *' --base-docker-image='*) ;;
      *) rest+=(--base-docker-image=python:3.12) ;;
    esac
    main=$(quoted bash launch/worker.sh run "$@")
    do_it xpk workload create "--workload=$name" "--tpu-type=$type" \
      "--max-restarts=$restarts" --restart-on-exit-codes=42 \
      --termination-grace-period-seconds=120 --script-dir=. "${rest[@]}" \
      "--command=export EXTRAS=tpu && exec $main"
    ;;
  status) do_it xpk workload list "--filter-by-job=$name" "${rest[@]}" ;;
  logs)
    # Of Kubernetes itself, whose current cluster XPK has set.
    first="jobset.sigs.k8s.io/jobset-name=$name"
    first+=",jobset.sigs.k8s.io/job-index=0"
    first+=",batch.kubernetes.io/job-completion-index=0"
    do_it kubectl logs --follow --tail=-1 --all-containers "--selector=$first"
    ;;
  delete) do_it xpk workload delete "--workload=$name" "${rest[@]}" ;;
esac
