"""The `--moe-llep-*` flags, made from LLEPConfig's fields and their docstrings."""

import argparse
import dataclasses

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_llep.config import LLEPConfig, flag_of


class _LLEPArguments(ArgumentGroupFactory):
    """Megatron's factory, with every flag under the `--moe-llep` prefix."""

    def _build_argparse_kwargs_from_field(self, attribute: dataclasses.Field) -> dict:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        flag = flag_of(attribute.name)
        kwargs |= {"arg_names": [flag], "dest": flag.removeprefix("--").replace("-", "_")}
        if attribute.name == "enabled":
            # True where a config is built in Python; on the command line one has to ask for it.
            kwargs |= {"action": "store_true", "default": False}
        if attribute.name == "ranks_per_node":
            kwargs |= {"type": _read_ranks_per_node, "metavar": "{auto,N}"}
        if "choices" in kwargs:
            # LLEPConfig checks the value itself, wherever it comes from.
            kwargs["metavar"] = "{" + ",".join(kwargs.pop("choices")) + "}"
        return kwargs


def _read_ranks_per_node(text: str) -> int | None:
    """None: as hostnames tell."""
    return None if text == "auto" else int(text)


def add_llep_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to a parser: Megatron's `extra_args_provider`."""
    _LLEPArguments(LLEPConfig).build_group(parser, title="least-loaded expert parallelism")
    return parser


def llep_config_from_args(args: argparse.Namespace) -> LLEPConfig:
    """Read LLEPConfig from parsed arguments.

    Raises:
        ValueError: names flag, value and remedy.
    """
    settings = {
        field.name: getattr(args, f"moe_llep_{field.name}")
        for field in dataclasses.fields(LLEPConfig)
        if field.name != "enabled"
    }
    if args.moe_llep_record is not None and not args.moe_llep:
        raise ValueError(
            f"--moe-llep-record {args.moe_llep_record}: give --moe-llep as well; with "
            "--moe-llep-planner observe plain expert parallelism runs and is recorded"
        )
    return LLEPConfig(enabled=args.moe_llep, **settings)
