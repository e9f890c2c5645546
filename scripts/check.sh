#!/usr/bin/env bash
# Every static check: lint, format, types, and which module may import which (the layers of [tool.importlinter]).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
pyright
lint-imports
