"""The command line of a training script: Megatron's flags, LLEP's, and what is refused."""

from argparse import Namespace

from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import add_llep_arguments, llep_config_from_args
from megatron_llep.training.data import check_data_arguments
from megatron_llep.validation import check_config

_UNSUPPORTED = {
    "sft": "--sft: this script trains on GPT data; leave the flag out",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking: packed sequences "
    "are not supported by this script; leave the flag out",
    "hybrid_context_parallel": "--hybrid-context-parallel: packed sequences are not supported by "
    "this script; leave the flag out",
}
_UNSUPPORTED_WITH_LLEP = {
    "use_megatron_fsdp": "--use-megatron-fsdp: it shards the expert weights that LLEP lends; use "
    "Megatron's DDP with --use-distributed-optimizer",
    "use_torch_fsdp2": "--use-torch-fsdp2: it shards the expert weights that LLEP lends; use "
    "Megatron's DDP with --use-distributed-optimizer",
}


def read_arguments() -> tuple[Namespace, LLEPConfig]:
    """Read `sys.argv`, before any process group exists.

    Returns:
        Megatron's arguments, validated and set as its global ones, and LLEP's settings.

    Raises:
        ValueError: what this script, or LLEP, cannot do; names flag, value and remedy.
    """
    # Before Megatron's validation, whose assertions need not name a flag or a remedy ...
    check_as_given(parse_args(add_llep_arguments))
    args = parse_and_validate_args(add_llep_arguments, args_defaults={})
    llep = llep_config_from_args(args)
    # ... and after it: it derives some settings and may take others from a checkpoint.
    if llep.enabled:
        check_config(core_transformer_config_from_args(args), llep)
    return args, llep


def check_as_given(args: Namespace) -> LLEPConfig:
    """Check arguments that are parsed and not yet validated by Megatron.

    Returns:
        LLEP's settings.

    Raises:
        ValueError: as `read_arguments`.
    """
    llep = llep_config_from_args(args)
    unsupported = _UNSUPPORTED | (_UNSUPPORTED_WITH_LLEP if llep.enabled else {})
    for name, message in unsupported.items():
        if getattr(args, name):
            raise ValueError(message)
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: Megatron trains MoE "
            "layers under tensor parallelism only with --sequence-parallel; add that flag"
        )
    check_data_arguments(args)
    if llep.enabled and not args.use_checkpoint_args:
        # Under the names of TransformerConfig, where they differ.
        renamed = {
            "num_moe_experts": args.num_experts,
            "cpu_offloading": args.cpu_offloading_num_layers > 0,
        }
        check_config(Namespace(**(vars(args) | renamed)), llep)
    return llep
