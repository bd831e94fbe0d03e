"""`check`: ask before training what LLEP says of a configuration."""

import argparse
import textwrap
from pathlib import Path

from megatron_llep.offline.check.cases import read_cases
from megatron_llep.offline.check.parse import FlagReader
from megatron_llep.offline.check.verdict import CaseVerdict, judge
from megatron_llep.offline.launch.flags import Flags, parse_extra

_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.description = (
        "Say of training configurations what LLEP accepts, what it does in another way, and what "
        "it refuses, with the way out. --moe-llep is added where it is missing. Needs no GPU, no "
        "data, and no world of the size that a configuration is for. Exit status 1 if something is "
        "refused."
    )
    parser.usage = "%(prog)s [-h] [RECIPE.yaml ...] [-- FLAGS ...]"
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE.yaml",
        help="flags under MODEL_ARGS, or under the names of many configurations; or a shell "
        "script, which is read and not run; after -- flags of Megatron's, which are added to each "
        "configuration, or are one by themselves",
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 if something is refused, else 0."""
    reader = FlagReader()
    cases, unreadable = collect(args.words, reader)
    refused = 0
    for name, flags in cases.items():
        verdict = judge(flags, reader)
        refused += bool(verdict.refused)
        print(format_verdict(name, verdict), end="\n\n")
    if cases:
        print(f"{len(cases) - refused} of {len(cases)} start with --moe-llep")
    if unreadable:
        raise ValueError("\n".join(unreadable))
    return 1 if refused else 0


def collect(words: list[str], reader: FlagReader) -> tuple[dict[str, Flags], list[str]]:
    """The configurations that a command line names, by name; and why some files have none.

    Args:
        words: files, then flags.
        reader: knows Megatron's flags.

    Raises:
        ValueError: nothing is named.
    """
    is_flag = [word.startswith("--") for word in words]
    end = is_flag.index(True) if any(is_flag) else len(words)
    extra = parse_extra(words[end:])
    cases: dict[str, Flags] = {}
    unreadable: list[str] = []
    for path in words[:end]:
        try:
            found = read_cases(Path(path), reader.knows)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        for name, flags in found.items():
            cases[name if name not in cases else f"{path}: {name}"] = flags | extra
    if not words:
        raise ValueError("nothing to check: give a RECIPE.yaml, or -- and Megatron's flags")
    return cases or ({"the flags given": extra} if end == 0 else {}), unreadable


def format_verdict(name: str, verdict: CaseVerdict) -> str:
    """The lines of one configuration."""
    rows = [("REFUSED", line) for line in verdict.refused]
    rows += [("notice", line) for line in verdict.notices]
    rows += [("untried", line) for line in verdict.untried]
    rows += [("not read", line) for line in verdict.unknown]
    rows.append(("accepted", f"{verdict.accepted} flags"))
    lines = [name, f"  {verdict.lending}"]
    for kind, line in rows:
        start = f"  {kind:9} "
        lines += textwrap.wrap(
            line,
            _WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
            break_long_words=False,
        )
    return "\n".join(lines)
