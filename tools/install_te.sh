#!/usr/bin/env bash
# Install Transformer Engine into a virtual environment that has torch, with or without a GPU:
#
#     bash tools/install_te.sh .venv
#
# Its torch extension has no wheel and is compiled here: 15 minutes on 2 cores. MAX_JOBS=16 is
# faster where there are more cores; each job takes some 2 GB of memory.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
python=$(cd "$1" && pwd)/bin/python
cd "$(dirname "$0")/.."
install=("$python" -m pip install --quiet
    --constraint constraints.txt --constraint constraints-te.txt)

# What compiles it. In pip's own build environment it would not find torch, hence
# --no-build-isolation below, and the compilers must be in this one.
"${install[@]}" ninja packaging pybind11 setuptools wheel

# CUDA's headers come from the wheels that torch brings (NVTE_BUILD_USE_NVIDIA_WHEELS), so no CUDA
# toolkit is needed; but those lack crt/host_config.h and nv/target.
"${install[@]}" nvidia-cuda-crt nvidia-cuda-cccl

# Compile first and install after: Megatron cannot be imported where half of it is installed. Not
# from pip's cache: a wheel there may have been compiled for another torch.
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
version=$(sed -n 's/^transformer_engine_torch==//p' constraints-te.txt)
echo "compiling Transformer Engine $version for torch (15 minutes on 2 cores)"
PATH="$(dirname "$python"):$PATH" MAX_JOBS="${MAX_JOBS:-2}" \
    NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE \
    "$python" -m pip wheel --quiet --no-cache-dir --no-build-isolation --no-deps \
    --wheel-dir "$wheels" "transformer_engine_torch==$version"

# nvidia-curand is needed at import and asked for by none of these packages.
"${install[@]}" transformer_engine transformer_engine_cu13 nvidia-curand "$wheels"/*.whl

# torch first: it loads the CUDA libraries that Transformer Engine does not find by itself.
"$python" -c 'import torch, transformer_engine.pytorch, transformer_engine as te
print("Transformer Engine", te.__version__, "with torch", torch.__version__)'
