"""Pretrain a GPT model with Megatron; `--moe-llep` balances its experts.

    torchrun --nproc-per-node 2 pretrain/pretrain_gpt.py MEGATRON_FLAGS --moe-llep

Every flag of Megatron's own `pretrain_gpt.py` for GPT data works here. Where no GPU is, the run
goes over gloo on the CPU, with the flags that this needs; the first lines of its output name them.
`tools/launch.py` makes the command from a YAML of `configs/`.
"""

import os
import sys
import time

# Before anything imports Megatron.
from megatron_llep.device import prepare_megatron_training, use_cpu_if_no_gpu

_START = time.time()


def main() -> None:
    """Parse the command line and train."""
    on_cpu = use_cpu_if_no_gpu() == "cpu"
    prepare_megatron_training()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_llep.progress import Progress
    from megatron_llep.training.arguments import read_arguments
    from megatron_llep.training.cpu_flags import flags_without_gpu
    from megatron_llep.training.data import build_datasets
    from megatron_llep.training.errors import tell_place
    from megatron_llep.training.model import build_model_config
    from megatron_llep.training.peak_memory import report_peak_memory
    from megatron_llep.training.step import forward_step

    if on_cpu:
        added = flags_without_gpu(sys.argv[1:])
        sys.argv += added
        if added and int(os.environ.get("RANK", "0")) == 0:
            print(f"no GPU: added {' '.join(added)}", flush=True)
    args, llep = read_arguments()
    progress = Progress()
    model_config = build_model_config(args, llep, progress)

    set_startup_timestamps(program_start=_START, main_entry=time.time())
    with tell_place(args, progress):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            build_datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    report_peak_memory()


if __name__ == "__main__":
    main()
