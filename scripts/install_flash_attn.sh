#!/usr/bin/env bash
# Installs flash-attn into .venv, for the CUDA and torch that are there: scripts/install_flash_attn.sh [--dry-run]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

readonly VERSION="${FLASH_ATTN_VERSION:-2.8.3}"
dry_run=false
case ${1:-} in
  "") ;;
  --dry-run) dry_run=true ;;
  *) fail "unknown argument $1; expected none, or --dry-run" ;;
esac

make_venv
python=.venv/bin/python
torch_facts=$("$python" -c 'import torch; print(torch.__version__, torch.version.cuda or "none", int(torch._C._GLIBCXX_USE_CXX11_ABI))' 2>/dev/null) ||
  fail "torch is not installed in .venv; run scripts/quickstart.sh or scripts/test.sh first."
read -r torch_version torch_cuda cxx11_abi <<<"$torch_facts"
python_version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
driver=none capability=none
if has_nvidia_gpu; then
  IFS=, read -r driver capability < <(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader | head -n 1 | tr -d ' ')
fi
nvcc_path=$(command -v nvcc || true)
toolkit=none
if [ -n "$nvcc_path" ]; then toolkit=$("$nvcc_path" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p'); fi

echo "Found: Python $python_version, torch $torch_version built for CUDA $torch_cuda (C++11 ABI: $cxx11_abi),"
echo "       driver $driver, compute capability $capability, CUDA toolkit (nvcc) $toolkit."

[ "$torch_cuda" != none ] || fail "this torch is a CPU build, for which there is no flash-attn. Nothing to do: attention=auto uses torch's SDPA."
[ "$capability" != none ] || fail "no NVIDIA GPU answers (nvidia-smi). flash-attn is built for one; run this on the GPU machine."
[ "${capability%%.*}" -ge 8 ] || fail "flash-attn needs compute capability 8.0 (A100); this card has $capability. attention=auto uses torch's SDPA."

if [ "$toolkit" = none ]; then
  echo "Will do: pip install flash-attn==$VERSION without building, from a wheel that fits the versions above."
  echo "         There is no nvcc, so that where no such wheel is published this ends with pip's error and no change."
  build=(--only-binary flash-attn)
else
  echo "Will do: pip install flash-attn==$VERSION --no-build-isolation: pip takes a wheel where one fits, else it compiles"
  echo "         with nvcc $toolkit, which takes 10 minutes to an hour and about 4 GB of memory for each of its jobs"
  echo "         (MAX_JOBS=${MAX_JOBS:-4})."
  if [ "${toolkit%%.*}" != "${torch_cuda%%.*}" ]; then
    fail "nvcc is $toolkit and torch was built for CUDA $torch_cuda: what it compiles would not load. Install a toolkit of CUDA ${torch_cuda%%.*}."
  fi
  export MAX_JOBS="${MAX_JOBS:-4}"
  build=(--no-build-isolation)
fi
if $dry_run; then exit 0; fi

pip_install packaging ninja psutil setuptools wheel
pip_install "${build[@]}" "flash-attn==$VERSION"
"$python" -c 'import flash_attn; print("flash-attn", flash_attn.__version__, "is importable; attention=auto takes it from now on")'
