#!/usr/bin/env bash
# Runs the tests, one process a core: scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
export OMP_NUM_THREADS=1 # the processes fill the cores; the long files, tests/e2e, go first
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
