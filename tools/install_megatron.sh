#!/usr/bin/env bash
# Install this project and its tests beside another megatron-core than constraints.txt names:
#
#     bash tools/install_megatron.sh .venv-megatron-0.18.2 0.18.2
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
python=$(cd "$1" && pwd)/bin/python
cd "$(dirname "$0")/.."
others=$(mktemp)
trap 'rm -f "$others"' EXIT
grep -v '^megatron-core==' constraints.txt >"$others"
# 0.18 needs einops for hierarchical context parallelism.
"$python" -m pip install --quiet --constraint "$others" --editable '.[train,wandb,record,dev]' \
    "megatron-core==$2" einops
