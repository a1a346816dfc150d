# Sourced by the other launchers: makes .venv and keeps it in step with
# requirements.txt. PYTHON names the interpreter to make it with.
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python_for_venv() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or later found; set PYTHON=/path/to/python" >&2
  return 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  interpreter=$(python_for_venv)
  if ! "$interpreter" -m venv --clear .venv; then
    rm -rf .venv
    echo "error: $interpreter cannot make .venv; see the lines above" >&2
    exit 1
  fi
fi
if ! cmp -s requirements.txt .venv/requirements.installed; then
  echo "installing requirements.txt into .venv (a minute or two) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r requirements.txt
  cp requirements.txt .venv/requirements.installed
fi
