#!/usr/bin/env bash
# Makes an environment from nothing and runs every check: lint, types, import contracts, doctests, tests.
#
#   bash scripts/test.sh               the default suite
#   bash scripts/test.sh --all         every test: kill tests, all shapes, parity with torch and TRL
#   bash scripts/test.sh --smoke       a handful of tests, for a further Python version
#   bash scripts/test.sh ... -- ARGS   ARGS go to pytest
#
# PYTHON=python3.12 chooses the interpreter; JOBS=4 the number of test processes. Torch is the oracle on Python 3.11;
# on other versions --all leaves its tests out unless PARITY=1 asks for the (large) installation there too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh

size=default
while [[ $# -gt 0 ]]; do
  case "$1" in
    --all) size=all ;;
    --smoke) size=smoke ;;
    --) shift; break ;;
    *) echo "test.sh: unknown option $1 (expected --all, --smoke or -- pytest arguments)" >&2; exit 2 ;;
  esac
  shift
done

find_python
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [[ $size == all && (${PARITY:-0} == 1 || $version == 3.11) ]]; then
  make_env ".venv-test-$version-parity" test,parity
else
  make_env ".venv-test-$version" test
fi

if [[ $size != smoke ]]; then
  ruff check .
  ruff format --check .
  mypy -p jdpo
  lint-imports
fi
case "$size" in
  all) select=(--all) ;;
  smoke) select=(-m smoke) ;;
  *) select=() ;;
esac
exec python -m pytest -q -n "${JOBS:-2}" --dist worksteal --durations 15 "${select[@]}" "$@"
