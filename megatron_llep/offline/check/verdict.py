"""What LLEP accepts of one configuration, what it does in another way, and what it refuses."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_llep.offline.check.parse import FlagReader
from megatron_llep.offline.launch.flags import Flags, read_value


@dataclass(frozen=True, kw_only=True)
class CaseVerdict:
    """Of one configuration with `--moe-llep`."""

    lending: str
    """The layout of its experts, and whether lending may gain."""
    accepted: int
    """Flags about which there is nothing to say."""
    notices: list[str]
    """What is replaced, a line each."""
    untried: list[str]
    """What is neither tested nor refused."""
    unknown: list[str]
    """Flags that were not read."""
    refused: list[str]
    """Why it does not start, and the way out of each."""


def judge(flags: Flags, reader: FlagReader) -> CaseVerdict:
    """Check one configuration, with `--moe-llep` where it has no such flag."""
    from megatron_llep.integration.settings.table import find_notices, read_arguments_as_config

    parsed = reader.read(flags | {"--moe-llep": True})
    args = parsed.args
    source = read_arguments_as_config(args)
    refused = list(_find_refusals(args))
    alone = args.expert_model_parallel_size == 1
    notices = [] if alone else find_notices(source)
    untried = list(_find_untried(parsed.given))
    named = {line.split(":")[0].split()[0] for line in (*refused, *notices, *untried)}
    return CaseVerdict(
        lending=describe_lending(args),
        accepted=len((flags.keys() & parsed.given.keys()) - named),
        notices=notices,
        untried=untried,
        unknown=[f"{flag}: no flag of Megatron's or LLEP's" for flag in parsed.unknown]
        + parsed.unreadable,
        refused=refused,
    )


def describe_lending(args: Namespace) -> str:
    """The layout of the experts, and whether there is anything to gain."""
    ep_size, num_experts = args.expert_model_parallel_size, args.num_experts
    if not num_experts:
        if args.use_checkpoint_args:
            return "the checkpoint says what experts there are: they are checked at start-up"
        return "no experts"
    if ep_size == 1:
        return f"EP 1, {num_experts} experts: nobody to lend to, plain Megatron runs"
    layout = f"EP {ep_size}, {num_experts} experts, {num_experts // ep_size} a rank"
    if args.moe_router_topk == num_experts:
        return f"{layout}: every token goes to all of them, lending has nothing to gain"
    if args.moe_router_force_load_balancing:
        return f"{layout}: loads are forced to be even, lending has nothing to gain"
    return f"{layout}: lending can help"


def _find_refusals(args: Namespace) -> Iterator[str]:
    from megatron_llep.integration.arguments import llep_config_from_args
    from megatron_llep.integration.settings.table import read_arguments_as_config
    from megatron_llep.training.arguments import refuse_layout
    from megatron_llep.validation import find_all_refusals

    try:
        llep = llep_config_from_args(args)
    except ValueError as error:
        yield str(error)
        return
    yield from refuse_layout(args)
    if not args.use_checkpoint_args:
        yield from find_all_refusals(read_arguments_as_config(args), llep)


def _find_untried(given: Flags) -> Iterator[str]:
    from megatron_llep.integration.settings.untried import UNTRIED

    for setting in UNTRIED:
        for span in setting.spans:
            flag, _, value = span.partition(" ")
            if flag in given and value in ("", str(read_value(given, flag))):
                yield f"{span}: untried; {setting.text}".removesuffix("; ")
