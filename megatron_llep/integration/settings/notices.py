"""What LLEP tells a user once, at start-up, on one rank."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from megatron_llep.metrics import install_tracker

NOBODY_TO_LEND_TO = (
    "--moe-llep: with one expert-parallel rank there is nobody to lend to, so plain Megatron runs; "
    "use --expert-model-parallel-size 2 or more, or leave --moe-llep out"
)


class Notices:
    """Collects lines and prints them in a block; each once in a process.

    Also where a model is built chunk by chunk, each from a specification of its own.
    """

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}  # in order

    def __deepcopy__(self, memo: dict[int, Any]) -> "Notices":
        """Itself: layers built from a copied specification tell what they have to tell once."""
        return self

    def add(self, lines: Iterable[str]) -> None:
        """Collect lines; those that are there already are not told again."""
        self._lines |= dict.fromkeys(lines)

    def tell(self) -> None:
        """Print on rank 0 what has not been told."""
        told = install_tracker().told
        lines = [line for line in self._lines if line not in told]
        told.update(lines)
        if lines and dist.get_rank() == 0:
            print("\n  ".join(["megatron_llep:", *lines]), flush=True)
