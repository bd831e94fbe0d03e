#!/usr/bin/env bash
# Pre-train on one machine, on its GPUs or, where there are none, on its CPU.
#
#   pretrain/torchrun.sh configs/tiny.yaml -- --mock-data
#   pretrain/torchrun.sh configs/tiny.yaml --no-llep -- --data-path data/docs --train-iters 50
#
# Arguments go to tools/launch.py as they are: the YAML file, its options, then `--` and Megatron's
# flags. Variables:
#   PYTHON  interpreter that has megatron-llep (default: .venv/bin/python, else python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then
    python=python3
fi

exec "$python" "$root/tools/launch.py" "$@"
