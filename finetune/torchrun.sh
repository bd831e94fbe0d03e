#!/usr/bin/env bash
# Fine-tune on one machine, on its GPUs or, where there are none, on its CPU. The configuration says
# which script runs: SFT or RL.
#
#   finetune/torchrun.sh configs/sft-demo.yaml -- --data-path data/sums.jsonl --save runs/sft
#   finetune/torchrun.sh configs/rl-demo.yaml -- --pretrained-checkpoint runs/sft
#
# Arguments and variables are those of pretrain/torchrun.sh.
set -euo pipefail

exec "$(dirname "${BASH_SOURCE[0]}")/../pretrain/torchrun.sh" "$@"
