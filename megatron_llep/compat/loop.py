"""Whether Megatron's own training loop runs, with which arguments, and where it is.

`megatron.training` is not imported for it: what is not loaded has no loop.
"""

import sys
from argparse import Namespace


def read_loop_arguments() -> Namespace | None:
    """Megatron's arguments; None where its training is not used."""
    training = sys.modules.get("megatron.training.global_vars")
    if training is None:
        return None
    try:
        return training.get_args()
    except AssertionError:  # not initialised
        return None


def read_iteration() -> int | None:
    """The iteration that the loop is in, from 0; None in any other loop."""
    return getattr(read_loop_arguments(), "curr_iteration", None)
