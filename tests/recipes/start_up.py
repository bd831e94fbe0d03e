"""Does a command line pass LLEP's start-up checks, and if not, what must change?"""

import contextlib
import functools
import io
import re
from argparse import ArgumentParser
from collections.abc import Mapping

from megatron.training.arguments import add_megatron_arguments

from megatron_llep.integration.arguments import add_llep_arguments
from megatron_llep.offline.launch.flags import Flags, format_flags
from megatron_llep.training.arguments import check_as_given

# What a refused flag becomes where leaving it out does not do: Megatron's default is refused too.
REPLACED: Mapping[str, object] = {
    "--moe-token-dispatcher-type": "alltoall",
    "--fp8-recipe": "tensorwise",
}
# Old names that Megatron turns into the new ones only when it validates, which needs a GPU.
RENAMED: Mapping[str, str] = {
    "--moe-router-padding-for-fp8": "--moe-router-padding-for-quantization"
}
_FLAG = re.compile(r"--[a-z0-9-]+")


def start_up_checks(flags: Flags) -> list[str]:
    """What LLEP refuses of a training command to which `--moe-llep` alone is added.

    Checks stop at the first refusal, so each refused flag is taken out and the rest checked again.

    Returns:
        The refusals, each beginning with the flag that it is about; empty if training starts.
    """
    refusals, _ = _find_refusals(flags)
    return refusals


def make_startable(flags: Flags) -> Flags:
    """The flags without those that LLEP refuses, or with what they must become."""
    _, accepted = _find_refusals(flags)
    return accepted


def list_refused_flags(flags: Flags) -> list[str]:
    """The flags that `start_up_checks` refuses."""
    return [name_flag(refusal) for refusal in start_up_checks(flags)]


def name_flag(refusal: str) -> str:
    """The flag that a refusal is about."""
    found = _FLAG.match(refusal)
    assert found, f"a refusal that does not begin with a flag: {refusal}"
    return found[0]


def _find_refusals(flags: Flags) -> tuple[list[str], Flags]:
    refusals: dict[str, str] = {}  # by flag
    left = {RENAMED.get(flag, flag): value for flag, value in flags.items()}
    while refusal := _check(format_flags(left)):
        flag = name_flag(refusal)
        if flag in refusals:
            break  # leaving it out is no way out: one expert-parallel rank, say
        refusals[flag] = refusal
        left.pop(flag, None)
        if flag in REPLACED:
            left[flag] = REPLACED[flag]
    return list(refusals.values()), left


def _check(tokens: list[str]) -> str | None:
    """The first refusal of a command line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = _make_parser().parse_args([*tokens, "--moe-llep"])
    except SystemExit as error:
        raise AssertionError(f"Megatron's parser refuses it: {said.getvalue()}") from error
    args.rank, args.world_size = 0, 1
    try:
        check_as_given(args)
    except ValueError as error:
        return str(error)
    return None


@functools.cache  # takes Megatron a hundred times as long as to parse with it
def _make_parser() -> ArgumentParser:
    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    return add_llep_arguments(parser)
