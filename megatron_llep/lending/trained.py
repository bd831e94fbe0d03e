"""Which weights of an expert train: only their gradients return.

A *mask* has a bit for each weight of an expert, by its place among them. It goes out with a rank's
counts, so that all ranks know of which weights any of them wants gradients.
"""

from collections.abc import Sequence
from functools import reduce

import torch

from megatron_llep.lending.parcel import Weights
from megatron_llep.placement.rank_note import MASK_BITS

_LAST = MASK_BITS - 1
"""The bit that all weights beyond share."""


def find_trained(natives: Sequence[Weights]) -> int:
    """The mask of the weights that train, in any of the M native experts."""
    mask = 0
    for expert in natives:
        for i, weight in enumerate(expert):
            if weight.requires_grad:
                mask |= 1 << min(i, _LAST)
    return mask


def list_trained(mask: int, num_weights: int) -> list[int]:
    """Places of the weights that train, of an expert's `num_weights`."""
    return [i for i in range(num_weights) if mask >> min(i, _LAST) & 1]


def find_common_dtype(weights: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype in which numbers of all these weights, at least one, lose no digits."""
    return reduce(torch.promote_types, (weight.dtype for weight in weights))
