"""The command line of a training script: Megatron's flags, LLEP's, and what is refused."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_llep.compat import read_flag
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import add_llep_arguments, llep_config_from_args
from megatron_llep.integration.hybrid_pattern import refuse_pattern
from megatron_llep.integration.settings.table import (
    read_arguments_as_config,
    replace_settings,
)
from megatron_llep.validation import check_config

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
        parser = add_arguments(add_llep_arguments(parser))
        let_help_print(parser)
        return parser

    # Before Megatron's validation, whose assertions need not name a flag or a remedy ...
    given = parse_args(add_all)
    check_as_given(given)
    check(given)
    args = parse_and_validate_args(add_all, args_defaults={})
    llep = llep_config_from_args(args)
    # ... and after it: it derives some settings and may take others from a checkpoint.
    if llep.enabled:
        what_runs, _ = say_what_runs(args, llep)
        check_config(core_transformer_config_from_args(what_runs), llep)
    return args, llep


def let_help_print(parser: ArgumentParser) -> None:
    """Escape percent signs that name no value: Megatron 0.19 has one, at which `--help` fails."""
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%%|%(?!\()", "%%", action.help)


def say_what_runs(args: Namespace, llep: LLEPConfig) -> tuple[Namespace, list[str]]:
    """A copy of the arguments that says what runs, for Megatron to make a configuration of.

    Where a GPU or a package is missing, Megatron's configuration cannot be made with all that LLEP
    replaces.

    Returns:
        The copy, and the notices.
    """
    copied = Namespace(**vars(args))
    if not llep.replaces or args.expert_model_parallel_size == 1:
        return copied, []
    if args.cuda_graph_modules:
        copied.cuda_graph_modules = list(args.cuda_graph_modules)  # or the user's would change
    return copied, replace_settings(copied, llep.dispatcher)


def check_as_given(args: Namespace) -> LLEPConfig:
    """Check arguments that are parsed and not yet validated by Megatron, for any script.

    Returns:
        LLEP's settings.

    Raises:
        ValueError: as `read_arguments`.
    """
    llep = llep_config_from_args(args)
    for refusal in refuse_layout(args):
        raise ValueError(refusal)
    if llep.enabled and not args.use_checkpoint_args:
        check_config(read_arguments_as_config(args), llep)
    return llep


def refuse_layout(args: Namespace) -> Iterator[str]:
    """What Megatron refuses, with LLEP and without, but late, or without naming a flag."""
    if args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        yield (
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: Megatron trains MoE "
            "layers under tensor parallelism only with --sequence-parallel; add that flag"
        )
    if args.num_experts and args.moe_latent_size and args.moe_shared_expert_overlap:
        yield (
            "--moe-shared-expert-overlap: Megatron does not train latent experts "
            f"(--moe-latent-size {args.moe_latent_size}) with it; leave the flag out"
        )
    if args.multi_latent_attention and args.group_query_attention:
        yield (
            "--group-query-attention: with --multi-latent-attention every head has keys and values "
            "of its own; leave the flag out"
        )
    hidden, heads = args.hidden_size, args.num_attention_heads
    if hidden and heads and hidden % heads and args.kv_channels is None:
        yield (
            f"--num-attention-heads {heads}: --hidden-size {hidden} is no multiple of it, so "
            "--kv-channels must be given (with --multi-latent-attention any number will do, as "
            "heads have other widths)"
        )
    yield from refuse_pattern(args)


def refuse_flags(args: Namespace, messages: dict[str, str]) -> None:
    """Refuse flags that are set.

    Args:
        args: parsed.
        messages: by the flag's name in `args`.

    Raises:
        ValueError: the message.
    """
    for name, message in messages.items():
        if read_flag(args, name):
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
