"""The commands of `python -m megatron_llep`, one module each."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "check": "say of a training configuration what LLEP accepts, replaces and refuses",
    "plan": "show one plan: which rank computes what, who lends to whom",
    "simulate": "predict time, memory and traffic of a model under plain EP and each planner",
    "tune": "find the best settings for the routing of a run, or say to leave it off",
    "calibrate": "measure this machine, for planner auto and for simulate",
    "view": "show a recording of a run's routing on one page: imbalance, loans, times, drift",
    "doctor": "say what is installed, what is supported, and how to mend what is broken",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status, 2 for a user's error."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m megatron_llep", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary}.")
        if argv and argv[0] == name:  # the others' modules need not be importable
            import_module(f"{__name__}.{name}").add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return import_module(f"{__name__}.{args.command}").run(args)
    except (ValueError, ImportError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
