#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
exec .venv/bin/python -m pytest "$@"
