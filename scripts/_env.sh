# Making a Python environment from nothing; sourced by quickstart.sh and test.sh, from the repository root.
#
#   find_python            sets PYTHON to a Python 3.11, 3.12 or 3.13 (kept as it is where it is set already)
#   make_env DIR EXTRAS    makes DIR with this project and the comma-separated extras in it, and activates it;
#                          a second call with an unchanged pyproject.toml takes a second
#
# uv is used where it is installed, plain venv and pip where not. Only the package index is asked for anything.

_python_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
  local found candidate
  if [[ -n "${PYTHON:-}" ]]; then
    if ! _python_fits "$PYTHON"; then
      found=$("$PYTHON" --version 2>&1) || found="nothing that runs"
      echo "PYTHON=$PYTHON is $found; Python 3.11, 3.12 or 3.13 is needed" >&2
      return 1
    fi
    return 0
  fi
  for candidate in python3.12 python3.11 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && _python_fits "$candidate"; then
      PYTHON=$candidate
      return 0
    fi
  done
  if command -v uv >/dev/null; then
    for candidate in 3.12 3.11 3.13; do
      if found=$(uv python find --no-project --no-python-downloads "$candidate" 2>/dev/null); then
        PYTHON=$found
        return 0
      fi
    done
  fi
  found=$(python3 --version 2>&1) || found="no python3 at all"
  echo "no suitable Python: 3.11, 3.12 or 3.13 is needed, and $found was found." >&2
  echo "Install one (python.org, your package manager, or 'uv python install 3.12'), or name one: PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

make_env() {
  local dir=$1 extras=${2:-} stamp wanted target=.
  find_python
  [[ -n "$extras" ]] && target=".[$extras]"
  # A moved folder or another interpreter makes an environment unusable, so both are in the key.
  wanted=$("$PYTHON" - "$dir" "$extras" <<'PY'
import hashlib, os, sys
key = hashlib.sha256(open("pyproject.toml", "rb").read())
key.update(repr((os.path.abspath(sys.argv[1]), sys.argv[2], sys.version, os.path.realpath(sys.executable))).encode())
print(key.hexdigest())
PY
  )
  stamp="$dir/.made-from"
  if [[ ! -x "$dir/bin/python" || "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    if [[ -e "$dir" && ! -f "$dir/pyvenv.cfg" ]]; then
      echo "$dir is there and is no Python environment; move it away" >&2
      return 1
    fi
    echo "making $dir with $("$PYTHON" --version 2>&1) (a few minutes the first time)" >&2
    if command -v uv >/dev/null; then
      uv venv --quiet --clear --no-project --python "$PYTHON" "$dir"
      uv pip install --quiet --python "$dir/bin/python" --editable "$target"
    else
      "$PYTHON" -m venv --clear "$dir"
      "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
      # setuptools warns about every editable installation, whatever the project looks like.
      PYTHONWARNINGS=ignore "$dir/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target"
    fi
    echo "$wanted" >"$stamp"
  fi
  VIRTUAL_ENV=$(cd "$dir" && pwd)
  PATH="$VIRTUAL_ENV/bin:$PATH"
  export VIRTUAL_ENV PATH
  unset PYTHONHOME
}
