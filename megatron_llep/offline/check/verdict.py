"""What LLEP accepts of one configuration, what it does in another way, and what it refuses."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_llep.config import OBSERVE
from megatron_llep.offline.check.parse import FlagReader, Parsed
from megatron_llep.offline.launch.flags import Flags, read_value

_EP_SIZE, _EXPERTS = "--expert-model-parallel-size", "--num-experts"
_MOST_NAMED = 12
_MANY = 1024  # more experts on a rank than any setting of LLEP's asks for


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
    _assume(args, parsed.open)
    source = read_arguments_as_config(args)
    refused = list(_find_refusals(args))
    nobody_lends = args.expert_model_parallel_size == 1 or args.moe_llep_planner == OBSERVE
    notices = [] if nobody_lends else find_notices(source, args.moe_llep_dispatcher)
    untried = list(_find_untried(parsed.given))
    named = {line.split(":")[0].split()[0] for line in (*refused, *notices, *untried)}
    return CaseVerdict(
        lending=describe_lending(args, parsed.open),
        accepted=len(parsed.given.keys() - named - ({"--moe-llep"} - flags.keys())),
        notices=notices,
        untried=untried,
        unknown=list(_list_unread(parsed)),
        refused=refused,
    )


def _assume(args: Namespace, open_: Flags) -> None:
    """Let a layout that is not filled in be one that lends, so that its other flags are judged."""
    if _EXPERTS in open_:
        args.num_experts = args.expert_model_parallel_size * _MANY
    if _EP_SIZE in open_ and args.num_experts:
        sizes = range(2, args.num_experts + 1)
        args.expert_model_parallel_size = next(p for p in sizes if args.num_experts % p == 0)


def describe_lending(args: Namespace, open_: Flags) -> str:
    """The layout of the experts, and whether there is anything to gain."""
    ep_size, num_experts = args.expert_model_parallel_size, args.num_experts
    if ep_size > 1 and num_experts and (_EXPERTS in open_ or _EP_SIZE in open_):
        layout = f"EP {open_.get(_EP_SIZE, ep_size)}, {open_.get(_EXPERTS, num_experts)} experts"
        given = " and ".join(f"{flag} NUMBER" for flag in (_EP_SIZE, _EXPERTS) if flag in open_)
        return f"{layout}: judged as if it lends; give {given} after --"
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


def _list_unread(parsed: Parsed) -> Iterator[str]:
    if parsed.unknown:
        more = len(parsed.unknown) - _MOST_NAMED
        names = ", ".join(parsed.unknown[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        yield f"{names}: no flag of Megatron's or LLEP's"
    yield from parsed.unreadable
    if parsed.open:
        flags = ", ".join(f"{flag} {value}" for flag, value in parsed.open.items())
        yield f"{flags}: not filled in; give them after -- if they matter"


def _find_untried(given: Flags) -> Iterator[str]:
    from megatron_llep.integration.settings.untried import UNTRIED

    for setting in UNTRIED:
        for span in setting.spans:
            flag, _, value = span.partition(" ")
            if given.get(flag, False) in (None, False):
                continue
            if value in ("", str(read_value(given, flag))):
                yield f"{span}: untried; {setting.text}".removesuffix("; ")
