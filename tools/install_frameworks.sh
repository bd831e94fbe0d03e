#!/usr/bin/env bash
# Install this project, its tests, and the frameworks that they train in:
#
#     bash tools/install_frameworks.sh .venv-frameworks
#
# Without what the frameworks ask for: some of it is pinned to other versions than Megatron's and
# each other's, some needs CUDA to build. constraints-frameworks.txt has what is imported here;
# tests/frameworks/framework_stubs.py stands for what is imported and not run.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
python=$(cd "$1" && pwd)/bin/python
cd "$(dirname "$0")/.."
"$python" -m pip install --quiet --constraint constraints.txt --editable '.[train,wandb,plot,record,hf,dev]'
frameworks=$(mktemp)
trap 'rm -f "$frameworks"' EXIT
grep '^[a-zA-Z]' constraints-frameworks.txt >"$frameworks"
"$python" -m pip install --quiet --no-deps --requirement "$frameworks" \
    "$(grep '^megatron-bridge==' constraints.txt)"
