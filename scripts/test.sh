#!/usr/bin/env bash
# Makes an environment from nothing and runs every check: lint, types, import contracts, doctests, tests.
#
#   bash scripts/test.sh               the default suite
#   bash scripts/test.sh --ci          the tests that install things, train for long or serve: what .ci/run adds
#   bash scripts/test.sh --extras      the notebook, the trackers and the documentation site, with their large packages
#   bash scripts/test.sh --all         every test: kill tests, all shapes, parity with torch and TRL
#   bash scripts/test.sh --smoke       a handful of tests, for a further Python version
#   bash scripts/test.sh ... -- ARGS   ARGS go to pytest; --cpu-table FILE there lists the CPU seconds of every test
#
# PYTHON=python3.12 chooses the interpreter; JOBS=4 the number of test processes. Torch is the oracle on Python 3.11;
# on other versions --all leaves its tests out unless PARITY=1 asks for the (large) installation there too.
#
# Programs that tests compile are kept in .compiled/ for the next run; JAX_COMPILATION_CACHE_DIR names another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh

size=default
while [[ $# -gt 0 ]]; do
  case "$1" in
    --all) size=all ;;
    --ci) size=ci ;;
    --extras) size=extras ;;
    --smoke) size=smoke ;;
    --) shift; break ;;
    *) echo "test.sh: unknown option $1 (expected --ci, --extras, --all, --smoke or -- pytest arguments)" >&2; exit 2 ;;
  esac
  shift
done

find_python
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [[ $size == all && (${PARITY:-0} == 1 || $version == 3.11) ]]; then
  make_env ".venv-test-$version-parity" test,parity
elif [[ $size == extras ]]; then
  make_env ".venv-test-$version-extras" test,docs,notebook,trackers
else
  make_env ".venv-test-$version" test
fi

if [[ $size == default || $size == all ]]; then
  ruff check .
  ruff format --check .
  mypy -p jdpo
  lint-imports
fi
case "$size" in
  all) select=(--all) ;;
  ci) select=(--ci) ;;
  extras) select=(--extras) ;;
  smoke) select=(-m smoke) ;;
  *) select=() ;;
esac
status=0
python -m pytest -q -n "${JOBS:-2}" --dist worksteal "${select[@]}" "$@" || status=$?
times >"$VIRTUAL_ENV/.times"
{ read -r; read -r user system; } <"$VIRTUAL_ENV/.times"
echo "CPU time of everything above: $user user, $system system"
exit "$status"
