"""What LLEP tells a user once, at start-up, on one rank."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

NOBODY_TO_LEND_TO = (
    "--moe-llep: with one expert-parallel rank there is nobody to lend to, so plain Megatron runs; "
    "use --expert-model-parallel-size 2 or more, or leave --moe-llep out"
)


class Notices:
    """Collects lines and prints each of them once, in a block."""

    def __init__(self) -> None:
        self._lines: dict[str, bool] = {}  # in order; whether it has been told

    def __deepcopy__(self, memo: dict[int, Any]) -> "Notices":
        """Itself: layers built from a copied specification tell what they have to tell once."""
        return self

    def add(self, lines: Iterable[str]) -> None:
        """Collect lines; those that are there already are not told again."""
        for line in lines:
            self._lines.setdefault(line, False)

    def tell(self) -> None:
        """Print on rank 0 what has not been told."""
        lines = [line for line, is_told in self._lines.items() if not is_told]
        self._lines = dict.fromkeys(self._lines, True)
        if lines and dist.get_rank() == 0:
            print("\n  ".join(["megatron_llep:", *lines]), flush=True)
