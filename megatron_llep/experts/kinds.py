"""Which class lends the experts of which of Megatron's modules."""

import torch

from megatron_llep.experts.base import LendableExperts
from megatron_llep.experts.grouped_mm import LendableGroupedMM
from megatron_llep.experts.sequential import LendableSequentialMLP
from megatron_llep.experts.te_grouped import LendableTEGroupedMLP

KINDS: tuple[type[LendableExperts], ...] = (
    LendableSequentialMLP,
    LendableGroupedMM,
    LendableTEGroupedMLP,
)


def find_kind(module: torch.nn.Module) -> type[LendableExperts] | None:
    """The class that lends the experts of a module, or None."""
    return next((kind for kind in KINDS if type(module) is kind.module_type), None)


def make_lendable(module: torch.nn.Module) -> LendableExperts:
    """The experts of a module, as LLEP sees them.

    Raises:
        ValueError: LLEP cannot lend the experts of such a module.
    """
    kind = find_kind(module)
    if kind is None:
        known = ", ".join(kind.module_type.__name__ for kind in KINDS)
        raise ValueError(
            f"--moe-llep: LLEP lends the experts of {known}, not of {type(module).__name__}"
        )
    return kind(module)
