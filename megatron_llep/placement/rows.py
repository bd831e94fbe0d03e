"""Rows of hidden states in the order of sending, and back: each is the other's gradient.

Letters: T tokens of this rank, H hidden size, N (token, expert) pairs of this rank.
"""

import torch

from megatron_llep.placement.pairs import Placement


def gather_rows(hidden: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Each pair's token: [T, H] -> [N, H].

    On a GPU a token's gradient is the sum of its rows' in a fixed order.
    """
    if placement.rows_by_token is None:
        return hidden.index_select(0, placement.token_index)
    return _GatherRows.apply(
        hidden, placement.token_index, placement.rows_by_token, placement.token_ends
    )


def sum_rows(rows: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Each token's rows added in a fixed order: [N, H] -> [T, H]; on a GPU."""
    return _SumRows.apply(
        rows, placement.token_index, placement.rows_by_token, placement.token_ends
    )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, token_index, rows_by_token, token_ends):
        ctx.save_for_backward(rows_by_token, token_ends)
        return hidden.index_select(0, token_index)

    @staticmethod
    def backward(ctx, grad_rows):
        from megatron_llep.placement import kernel

        return kernel.sum_rows(grad_rows, *ctx.saved_tensors), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, token_index, rows_by_token, token_ends):
        from megatron_llep.placement import kernel

        ctx.save_for_backward(token_index)
        return kernel.sum_rows(rows, rows_by_token, token_ends)

    @staticmethod
    def backward(ctx, grad_output):
        (token_index,) = ctx.saved_tensors
        return grad_output.index_select(0, token_index), None, None, None
