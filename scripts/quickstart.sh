#!/usr/bin/env bash
# Trains a real 135M-parameter model on the quickstart recipe: scripts/quickstart.sh [key=value ...] [--resume ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment base

arguments=("$@")
names_its_run=false
for argument in "$@"; do
  case $argument in output_dir=* | --resume | --resume=* | --help) names_its_run=true ;; esac
done
if ! $names_its_run && [ -e runs/quickstart ]; then # a run directory is never written twice
  number=2
  while [ -e "runs/quickstart-$number" ]; do number=$((number + 1)); done
  arguments+=("output_dir=runs/quickstart-$number")
fi
exec .venv/bin/grpo train quickstart ${arguments[@]+"${arguments[@]}"}
