"""Convert between a Hugging Face folder and a Megatron checkpoint, without training.

    python tools/convert_hf.py --hf-load MODEL --save CHECKPOINT
    python tools/convert_hf.py --load CHECKPOINT --hf-config MODEL --hf-save NEW_MODEL

The shape, and the precision in which weights are kept, come from MODEL's config.json. The
checkpoint is a distributed one (torch_dist), of weights alone, which any layout can load:

    ... --load CHECKPOINT --finetune

One process holds the whole model; under torchrun, with Megatron's flags for a layout, each holds
its part. All other flags of Megatron work too.
"""

import argparse
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence

# Before anything imports Megatron.
from megatron_llep.device import prepare_megatron_training, use_cpu_if_no_gpu

_ALWAYS = shlex.split("""
    --micro-batch-size 1 --no-save-optim --no-save-rng --no-load-optim --no-load-rng --finetune
    --ckpt-format torch_dist --save-interval 1 --mock-data
""")
_PRECISION = {"bfloat16": ["--bf16"], "float16": ["--fp16"]}


def main() -> None:
    """Read one format and write the other."""
    on_cpu = use_cpu_if_no_gpu() == "cpu"
    prepare_megatron_training()
    import torch.distributed as dist
    from megatron.training import training
    from megatron.training.arguments import parse_and_validate_args

    from megatron_llep.training.cpu_flags import flags_without_gpu
    from megatron_llep.training.hf.arguments import add_hf_arguments, check_hf_arguments
    from megatron_llep.training.hf.flags import flags_from_hf

    argv = complete_flags(sys.argv[1:])
    argv += flags_from_hf(argv)
    if on_cpu:
        argv += flags_without_gpu(argv)
    sys.argv[1:] = argv
    args = parse_and_validate_args(add_hf_arguments)
    check_hf_arguments(args)
    if "RANK" not in os.environ:  # started by hand and not by torchrun
        dist.init_process_group(
            args.distributed_backend, store=dist.HashStore(), rank=0, world_size=1
        )
    training.initialize_megatron()
    convert(args)


def complete_flags(argv: Sequence[str]) -> list[str]:
    """Add to a command line what a conversion needs and the user need not say.

    Raises:
        ValueError: it does not say what to convert into what; names the flags.
    """
    from megatron.training.checkpointing import checkpoint_exists

    from megatron_llep.training.hf.arguments import add_hf_arguments, hf_source
    from megatron_llep.training.hf.config_file import read_config

    parser = add_hf_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for flag in ("--load", "--save", "--tokenizer-type", "--seq-length"):
        parser.add_argument(flag)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    given = parser.parse_known_args(argv)[0]
    source = hf_source(given.hf_load, given.hf_config)
    if source is None or (given.hf_load is None) == (given.load is None):
        raise ValueError(
            "give --hf-load MODEL --save CHECKPOINT, or --load CHECKPOINT --hf-config MODEL "
            "--hf-save NEW_MODEL"
        )
    if given.save is None and given.hf_save is None:
        raise ValueError("nothing is to be written: give --save or --hf-save")
    if given.load is not None and not checkpoint_exists(given.load):
        raise ValueError(f"--load {given.load}: there is no Megatron checkpoint; check the path")
    if checkpoint_exists(given.save):
        raise ValueError(f"--save {given.save}: there is a checkpoint already; name a new folder")
    config = read_config(*source)
    added = [*_ALWAYS, *_PRECISION.get(config.get("dtype", "torch_dtype", default=""), [])]
    if given.seq_length is None:
        added += ["--seq-length", str(config.require("max_position_embeddings"))]
    if given.tokenizer_type is None:  # none is needed, and the folder may have none
        added += ["--tokenizer-type", "NullTokenizer"]
        added += ["--vocab-size", str(config.require("vocab_size"))]
    if given.tensor_model_parallel_size > 1:
        added.append("--sequence-parallel")
    return [*argv, *added]


def convert(args: Namespace) -> None:
    """Build the model, fill it from one format and write the other; all ranks call it."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    from megatron_llep.config import LLEPConfig
    from megatron_llep.lending.progress import Progress
    from megatron_llep.training.hf.install import install_hf
    from megatron_llep.training.model import build_model_config

    config = build_model_config(args, LLEPConfig(enabled=False), Progress())
    save_hf = install_hf(config, args)
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = builder.build_distributed_models(groups, wrap_with_ddp=False)
    if args.load is not None:
        load_checkpoint(model, None, None)
    if args.save is not None:
        save_checkpoint(0, model, None, None, 0)
    save_hf()


if __name__ == "__main__":
    main()
