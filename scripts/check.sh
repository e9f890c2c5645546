#!/usr/bin/env bash
# Every static check: lint, format, types, and which module may import which (the layers of [tool.importlinter]).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
export PATH="$PWD/.venv/bin:$PATH"

failed=()
check() { # all run, so that one push shows every complaint
  echo "== $*"
  "$@" || failed+=("$*")
}
check ruff check .
check ruff format --check .
check pyright
check lint-imports
[ ${#failed[@]} -eq 0 ] || fail "failed: $(printf "%s; " "${failed[@]}")"
