"""The command line of a training script: Megatron's flags, LLEP's, and what is refused."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import add_llep_arguments, llep_config_from_args
from megatron_llep.integration.graphs import keep_planning_out_of_graphs
from megatron_llep.validation import check_config

_UNSUPPORTED_WITH_LLEP = {
    "use_megatron_fsdp": "--use-megatron-fsdp: it shards the expert weights that LLEP lends; use "
    "Megatron's DDP with --use-distributed-optimizer",
    "use_torch_fsdp2": "--use-torch-fsdp2: it shards the expert weights that LLEP lends; use "
    "Megatron's DDP with --use-distributed-optimizer",
    "overlap_param_gather_with_optimizer_step": "--overlap-param-gather-with-optimizer-step: "
    "Megatron 0.19 gathers the experts of a stage's first chunk before their optimizer has "
    "stepped, and their replicas drift apart; leave the flag out",
    "save_activations_interval": "--save-activations-interval: what foreign experts compute would "
    "be saved under native experts' names; leave the flag out",
    "save_dgrads_interval": "--save-dgrads-interval: what foreign experts compute would be saved "
    "under native experts' names; leave the flag out",
    "save_tokens_per_expert_interval": "--save-tokens-per-expert-interval: it would save the "
    "tokens of slots, and not of experts; use --moe-routing-trace-path",
    "fake_process_group": "--fake-process-group: plans are made from counts that are exchanged; "
    "leave the flag out",
}

_DATA_ARGUMENTS = (
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)


def read_arguments(
    add_arguments: Callable[[ArgumentParser], ArgumentParser], check: Callable[[Namespace], None]
) -> tuple[Namespace, LLEPConfig]:
    """Read `sys.argv`, before any process group exists.

    Args:
        add_arguments: adds the script's own flags, besides LLEP's.
        check: refuses what the script cannot do, in arguments as given.

    Returns:
        Megatron's arguments, validated and set as its global ones, and LLEP's settings.

    Raises:
        ValueError: what this script, or LLEP, cannot do; names flag, value and remedy.
    """

    def add_all(parser: ArgumentParser) -> ArgumentParser:
        return add_arguments(add_llep_arguments(parser))

    # Before Megatron's validation, whose assertions need not name a flag or a remedy ...
    given = parse_args(add_all)
    check_as_given(given)
    check(given)
    args = parse_and_validate_args(add_all, args_defaults={})
    llep = llep_config_from_args(args)
    # ... and after it: it derives some settings and may take others from a checkpoint.
    if llep.enabled:
        check_config(core_transformer_config_from_args(args), llep)
        keep_planning_out_of_graphs(args)
    return args, llep


def check_as_given(args: Namespace) -> LLEPConfig:
    """Check arguments that are parsed and not yet validated by Megatron, for any script.

    Returns:
        LLEP's settings.

    Raises:
        ValueError: as `read_arguments`.
    """
    llep = llep_config_from_args(args)
    if llep.enabled:
        refuse_flags(args, _UNSUPPORTED_WITH_LLEP)
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: Megatron trains MoE "
            "layers under tensor parallelism only with --sequence-parallel; add that flag"
        )
    if llep.enabled and not args.use_checkpoint_args:
        # Under the names of TransformerConfig, where they differ.
        renamed = {
            "num_moe_experts": args.num_experts,
            "cpu_offloading": args.cpu_offloading_num_layers > 0,
            "cuda_graph_modules": args.cuda_graph_modules or args.cuda_graph_scope_deprecated,
            "fp8_param": args.fp8_param_gather,
        }
        check_config(Namespace(**(vars(args) | renamed)), llep)
    return llep


def refuse_flags(args: Namespace, messages: dict[str, str]) -> None:
    """Refuse flags that are set.

    Args:
        args: parsed.
        messages: by the flag's name in `args`.

    Raises:
        ValueError: the message.
    """
    for name, message in messages.items():
        if getattr(args, name):
            raise ValueError(message)


def require_data(args: Namespace, kind: str, or_else: str = "") -> None:
    """Refuse a command line that names no data.

    Args:
        args: parsed.
        kind: what --data-path takes.
        or_else: what else can be done, if anything.

    Raises:
        ValueError: names the flags to choose from.
    """
    if all(getattr(args, name) is None for name in _DATA_ARGUMENTS):
        flags = ", ".join("--" + name.replace("_", "-") for name in _DATA_ARGUMENTS[1:])
        raise ValueError(f"--data-path is missing: give {kind}, or one of {flags}{or_else}")
