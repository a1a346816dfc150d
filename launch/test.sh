#!/usr/bin/env bash
# Lint, format check and tests; --all runs the slow ones as well. All other
# arguments go to pytest.
set -euo pipefail
EXTRAS=${EXTRAS:+$EXTRAS,}test
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# The TPU compiler that this JAX names, for tests that compile without a TPU. It
# lies beside the environment: inside, JAX would look for a TPU at every start.
libtpu=.venv/libtpu
pin=$(.venv/bin/python -c 'from importlib.metadata import requires
print(next(r.split(";")[0] for r in requires("jax") if r[:6] == "libtpu"))')
if [ "$(cat "$libtpu/pin" 2>/dev/null)" != "$pin" ]; then
  echo "installing $pin into $libtpu ..."
  rm -rf "$libtpu"
  if .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --target "$libtpu" "$pin"; then
    echo "$pin" >"$libtpu/pin"
  else
    echo "no $pin for this machine: tests that compile for TPUs are skipped" >&2
  fi
fi

arguments=()
for argument in "$@"; do
  case $argument in
    --all) arguments+=(-m "slow or not slow") ;;
    *) arguments+=("$argument") ;;
  esac
done

.venv/bin/ruff check .
.venv/bin/ruff format --check .
PYTHONPATH="$libtpu${PYTHONPATH:+:$PYTHONPATH}" \
  .venv/bin/python -m pytest -n 2 --dist worksteal ${arguments[@]+"${arguments[@]}"}
