# shellcheck shell=bash
# Sourced by launchers of several processes: what their exit codes mean
# together, commands that are printed, whether a workdir outlives the machine.

# Whether the same command, started again, can go on after this exit code: 42 is
# ours for that; above 127 something killed the process (XPK decides alike).
resumes() { [ "$1" -eq 42 ] || [ "$1" -gt 127 ]; }

# The exit code of a job, from those of its processes. One that was stopped or
# that failed takes the others down; so an error that a restart cannot mend
# counts before all else, then 42, then what killed a process.
verdict() {
  local code rank best=0 result=0
  for code in "$@"; do
    rank=3
    if [ "$code" -eq 0 ]; then
      rank=0
    elif [ "$code" -eq 42 ]; then
      rank=2
    elif resumes "$code"; then
      rank=1
    fi
    if [ "$rank" -gt "$best" ]; then
      best=$rank result=$code
    fi
  done
  echo "$result"
}

# Arguments as one line that a shell reads back.
quoted() {
  local argument line=''
  for argument in "$@"; do
    case $argument in
      '' | *[!A-Za-z0-9_./:=,@%+-]*)
        argument="'$(printf '%s' "$argument" | sed "s/'/'\\\\''/g")'"
        ;;
    esac
    line="$line $argument"
  done
  echo "${line# }"
}

# Prints a command and runs it; in a dry run it is printed only.
do_it() {
  if [ -n "${dry_run:-}" ]; then
    quoted "$@"
  else
    quoted "$@" >&2
    "$@"
  fi
}

# Ends the launcher where a run would be lost with its machine.
check_workdir() {
  local argument
  for argument in "$@"; do
    case $argument in
      --workdir=gs://*/* | --workdir=/*) ;;
      --workdir=* | --workdir)
        echo "error: $argument would lie on the machines' own disks; write" \
          "--workdir=gs://BUCKET/RUN, or the whole path of a mounted folder" >&2
        exit 2
        ;;
    esac
  done
}
