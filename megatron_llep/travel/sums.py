"""Rows of the same token added up.

Letters: T tokens, H hidden size, N rows.
"""

import torch
from megatron.core.transformer.moe.moe_utils import unpermute

from megatron_llep.placement import Placement, sum_rows


def add_up(rows: torch.Tensor, placement: Placement, num_tokens: int) -> torch.Tensor:
    """Each token's rows added: [N, H] -> [T, H].

    On a CPU by Megatron's own operators, to its bits; on a GPU in a fixed order and in fp32.
    """
    if placement.rows_by_token is None:  # on a CPU
        return unpermute(rows, placement.token_index, torch.Size((num_tokens, rows.shape[1])))
    return sum_rows(rows, placement)
