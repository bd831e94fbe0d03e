#!/usr/bin/env bash
# Fine-tune on several nodes under Slurm. The configuration says which script runs: SFT or RL. Submit
# it from the root of the checkout, which all nodes must see at the same path:
#
#   sbatch --nodes 1 --gpus-per-node 8 finetune/slurm.sh configs/sft-qwen3-30b-a3b.yaml \
#       -- --hf-load Qwen3-30B-A3B --tokenizer-model Qwen3-30B-A3B --data-path chat.jsonl
#
# Arguments and variables are those of pretrain/slurm.sh.
#SBATCH --job-name=megatron-llep-finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this script from its spool folder, so its own path says nothing.
exec "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/pretrain/slurm.sh" "$@"
