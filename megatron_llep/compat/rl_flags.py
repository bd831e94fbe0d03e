"""Megatron 0.18 has a flag of the name of one of ours, which it means for its own rollouts."""

import argparse

from megatron_llep.compat import MEGATRON


def add_group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """A group whose flags take the place of Megatron's of the same name."""
    if MEGATRON >= (0, 19):
        return parser.add_argument_group(title=title)
    # What its validation reads; 1, where it is None, does nothing without rollouts of its own.
    parser.set_defaults(rl_generation_batch_size=None)
    return parser.add_argument_group(title=title, conflict_handler="resolve")
