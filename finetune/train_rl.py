"""Train a GPT model with GRPO in Megatron's own loop; `--moe-llep` balances its experts.

    torchrun --nproc-per-node 2 finetune/train_rl.py MEGATRON_FLAGS \
        --rl-task my_task.py:make_task --moe-llep

Prompts and rewards come from the function that `--rl-task` names; Megatron's `--grpo-*` flags say
how the model learns from them. docs/post_training.md has an example. `tools/launch.py` makes the
command from a YAML of `configs/`.
"""

import time

# Before anything imports Megatron.
from megatron_llep.device import prepare_megatron_training, use_cpu_if_no_gpu

_START = time.time()


def main() -> None:
    """Parse the command line and train."""
    use_cpu_if_no_gpu()
    prepare_megatron_training()
    from megatron_llep.training.job import Job, run
    from megatron_llep.training.rl.arguments import (
        add_rl_arguments,
        check_rl_arguments,
        find_rl_flags,
    )
    from megatron_llep.training.rl.loop import install
    from megatron_llep.training.rl.step import forward_step

    job = Job(
        build_datasets=None,
        forward_step=forward_step,
        add_arguments=add_rl_arguments,
        check=check_rl_arguments,
        flag_sources=[("Megatron's loop runs GRPO", find_rl_flags)],
        loop_options=install,
    )
    run(job, started=_START)


if __name__ == "__main__":
    main()
