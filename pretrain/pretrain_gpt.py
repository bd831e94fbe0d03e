"""Pretrain a GPT model with Megatron; `--moe-llep` balances its experts.

    torchrun --nproc-per-node 2 pretrain/pretrain_gpt.py MEGATRON_FLAGS --moe-llep

Every flag of Megatron's own `pretrain_gpt.py` for GPT data works here. Where no GPU is, the run
goes over gloo on the CPU, with the flags that this needs; the first lines of its output name them.
`tools/launch.py` makes the command from a YAML of `configs/`.
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

    run_pretraining(is_hybrid=False, started=_START)


if __name__ == "__main__":
    main()
