# shellcheck shell=bash
# Sourced by the other launchers: makes .venv, installs this checkout into it
# (editable) and keeps it in step with requirements.txt and pyproject.toml.
# PYTHON names the interpreter to make it with. EXTRAS=tpu or EXTRAS=cuda adds
# an accelerator; extras once installed stay.
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit

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

# The extras asked for now and before, as pip writes them: test,tpu.
installed=.venv/installed
extras=$(printf '%s,%s' "${EXTRAS:-}" "$(head -n 1 "$installed" 2>/dev/null)" |
  tr ', ' '\n' | sed '/^$/d' | sort -u | paste -s -d , -)
for extra in ${extras//,/ }; do
  if ! grep -q "^$extra = \[" pyproject.toml; then
    echo "error: EXTRAS=$extra is unknown; choose from tpu and cuda" >&2
    exit 2
  fi
done
wanted=$(echo "$extras" && cat requirements.txt pyproject.toml)
if [ "$wanted" != "$(cat "$installed" 2>/dev/null)" ]; then
  echo "installing into .venv (a minute or two) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable ".${extras:+[$extras]}"
  echo "$wanted" >"$installed"
fi
