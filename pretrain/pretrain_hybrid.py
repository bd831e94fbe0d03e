"""Pretrain a hybrid model with Megatron; `--moe-llep` balances its experts.

    torchrun --nproc-per-node 2 pretrain/pretrain_hybrid.py MEGATRON_FLAGS \
        --hybrid-layer-pattern '*E*E' --moe-llep

One symbol a layer: `*` attention, `E` experts, `-` dense, `M` Mamba, `G` gated delta net, `+`
multi-latent attention, `D` sparse attention; `|` ends a segment of the pipeline, and `/` begins a
depth of multi-token prediction. A layer of a GPT model with experts is `*E`. Everything else is as
in `pretrain_gpt.py`.
"""

import time

# Before anything imports Megatron.
from megatron_llep.device import prepare_megatron_training, use_cpu_if_no_gpu

_START = time.time()


def main() -> None:
    """Parse the command line and train."""
    use_cpu_if_no_gpu()
    prepare_megatron_training()
    from megatron_llep.training.pretraining import run_pretraining

    run_pretraining(is_hybrid=True, started=_START)


if __name__ == "__main__":
    main()
