#!/usr/bin/env bash
# Builds the documentation site from docs/ into build/site, in an environment of its own. A warning is an error.
#
#   bash scripts/docs.sh               then open build/site/index.html
#
# PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
if [[ $# -gt 0 ]]; then
  echo "docs.sh: takes no arguments" >&2
  exit 2
fi
make_env .venv-docs docs
python -m sphinx -b html -W --keep-going -q docs build/site
echo "the site is in build/site/index.html"
