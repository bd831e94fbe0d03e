"""What a layer's experts are made of, to be compared between ranks before any of them is lent."""

import hashlib
from dataclasses import dataclass

import torch

from megatron_llep.experts.base import LendableExperts
from megatron_llep.experts.changes import check_not_sharded
from megatron_llep.experts.kinds import make_lendable
from megatron_llep.experts.quantised import check_lendable
from megatron_llep.placement.rank_note import DIGEST_BITS


@dataclass(frozen=True, kw_only=True)
class ExpertForm:
    """In words, a line for each module and weight, and as a number."""

    text: str = ""
    """Or why they cannot be lent."""
    refused: bool = False
    digest: int = 0
    """Of DIGEST_BITS."""


def look_at_experts(
    experts: torch.nn.Module, layer: str
) -> tuple[LendableExperts | None, ExpertForm]:
    """See how experts can be lent, with whatever is around their linears.

    Args:
        experts: a layer's.
        layer: which one, in words.

    Returns:
        The experts, as LLEP sees them, and what they are made of; None where they are refused.
    """
    try:
        check_not_sharded(experts)
        check_lendable(experts)
        lendable = make_lendable(experts)
        text = "\n".join(lendable.describe())
    except ValueError as error:
        return None, ExpertForm(text=f"{error} (in {layer})", refused=True)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 64 - DIGEST_BITS
    return lendable, ExpertForm(text=text, digest=digest)
