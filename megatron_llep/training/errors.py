"""An error that ends training says in which step and layer its rank was."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator

from megatron_llep.lending.progress import Progress


@contextlib.contextmanager
def tell_place(args: Namespace, progress: Progress) -> Iterator[None]:
    """Add to any error from within the step, as Megatron counts them, and the last MoE layer."""
    try:
        with progress.told_in_errors():
            yield
    except Exception as error:
        # Set by Megatron's training loop, to the steps that are done.
        if getattr(args, "curr_iteration", None) is not None:
            error.add_note(f"megatron_llep: this rank was in step {args.curr_iteration + 1}")
        raise
