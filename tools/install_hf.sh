#!/usr/bin/env bash
# Install megatron-bridge, which converts Hugging Face checkpoints, beside the extra `hf`:
#
#     bash tools/install_hf.sh .venv
#
# Without what it asks for: it pins an older wandb, and wants packages for training that are not
# needed to convert weights. The extra has what is.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
python=$(cd "$1" && pwd)/bin/python
cd "$(dirname "$0")/.."
"$python" -m pip install --quiet --no-deps --constraint constraints.txt megatron-bridge
