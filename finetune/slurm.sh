#!/usr/bin/env bash
# Pre-train on several nodes under Slurm: one torchrun a node, one process a GPU. Submit it from
# the root of the checkout, which all nodes must see at the same path:
#
#   sbatch --nodes 8 --gpus-per-node 8 pretrain/slurm.sh configs/gpt-oss-120b.yaml \
#       -- --data-path data/docs --save checkpoints
#
# Arguments go to tools/launch.py as they are. sbatch options on the command line win over the
# #SBATCH lines below. Variables:
#   PYTHON       interpreter that has megatron-llep (default: .venv/bin/python, else python3)
#   MASTER_PORT  free port on the first node (default: 29500)
#   SRUN_ARGS    more options for srun, split at spaces, such as "--container-image=IMAGE"
#SBATCH --job-name=megatron-llep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "pretrain/slurm.sh runs under Slurm: sbatch pretrain/slurm.sh configs/FILE.yaml" >&2
    exit 2
fi

# Slurm runs a copy of this script from its spool folder, so its own path says nothing.
root=$SLURM_SUBMIT_DIR
if [[ ! -f $root/tools/launch.py ]]; then
    echo "no tools/launch.py in $root: submit from the root of the checkout" >&2
    exit 2
fi
python=${PYTHON:-$root/.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then
    python=python3
fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${hosts%%$'\n'*}:${MASTER_PORT:-29500}
read -r -a srun_args <<<"${SRUN_ARGS:-}"

# Options of launch.py must come before the `--` that the arguments may hold. The node's rank is
# known only where the task runs.
# shellcheck disable=SC2016
exec srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${srun_args[@]}" bash -c '
    exec "$1" "$2/tools/launch.py" --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
        --rdzv-endpoint "$3" "${@:4}"
' bash "$python" "$root" "$endpoint" "$@"
