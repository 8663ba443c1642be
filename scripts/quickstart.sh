#!/usr/bin/env bash
# Makes an environment from nothing and runs the quickstart: standard training and DPO, side by side.
#
#   bash scripts/quickstart.sh                          everything into quickstart/
#   bash scripts/quickstart.sh --frequencies 5,4,1 --output_dir quickstart-5-4-1
#   bash scripts/quickstart.sh --help
#
# PYTHON=python3.12 chooses the interpreter. No GPU is needed, and no network beyond the package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
make_env .venv ""
exec python -m jdpo.cli.main quickstart "$@"
