"""Fine-tune a GPT model on conversations with Megatron; `--moe-llep` balances its experts.

    torchrun --nproc-per-node 2 finetune/sft_gpt.py MEGATRON_FLAGS --data-path chat.jsonl \
        --moe-llep

`--data-path` takes JSONL files, with Megatron's weights and `--split`; docs/post_training.md has
the forms of a line. `tools/launch.py` makes the command from a YAML of `configs/`.
"""

import time
from functools import partial

# Before anything imports Megatron.
from megatron_llep.device import prepare_megatron_training, use_cpu_if_no_gpu

_START = time.time()


def main() -> None:
    """Parse the command line and train."""
    use_cpu_if_no_gpu()
    prepare_megatron_training()
    from megatron_llep.training.job import Job, run
    from megatron_llep.training.sft.arguments import (
        add_sft_arguments,
        check_sft,
        flags_of_sft,
        options_of_sft,
    )
    from megatron_llep.training.sft.dataset import build_sft_datasets
    from megatron_llep.training.step import forward_step

    job = Job(
        build_datasets=build_sft_datasets,
        forward_step=partial(forward_step, packed=True),
        add_arguments=add_sft_arguments,
        check=check_sft,
        flag_sources=[("answers weigh by token", flags_of_sft)],
        loop_options=options_of_sft,
    )
    run(job, started=_START)


if __name__ == "__main__":
    main()
