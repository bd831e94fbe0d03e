"""Rows that arrived at a rank: from the order of their sources to that of its slots, and back.

Letters: R sources, M native and S foreign slots, N rows, n rows of a part of the slots, H hidden
size.

A *part* is some slots that follow each other, whose rows are computed together. Each part gets a
tensor of its own: cut out of one for all slots, and joined again, every row would be copied once
more in forward and in backward.

One permutation serves both ways: rows are gathered by it, and their gradients are put back to where
the rows came from. It is all that is kept for backward, and every row is copied once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_llep.placement.chunks import list_rows


def order_by_slot(counts: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """Where the rows are that arrived, by slot, then source; without a host sync.

    Args:
        counts: int64 [R, M + S], rows of each source for each slot.
        device: of the rows.

    Returns:
        int64 [N]; None where there is one slot, as rows arrive in its order.
    """
    if counts.shape[1] == 1:
        return None
    first = (counts.cumsum() - counts.ravel()).reshape(counts.shape)
    return list_rows(np.stack((first.T.ravel(), counts.T.ravel())), device)


def split_by_slot(
    rows: torch.Tensor, order: torch.Tensor | None, sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Sort rows by slot, then source.

    Args:
        rows: [N, ...], by source, then slot.
        order: from `order_by_slot`.
        sizes: n of each part; N in all.

    Returns:
        [n, ...] of each part; of no rows, but on the way of the gradients, if it has no slots.
    """
    if order is None:  # as in Megatron, nothing is copied
        assert len(sizes) == 1
        return [rows]
    return list(_SplitBySlot.apply(rows, order.split(list(sizes))))


def join_by_source(outputs: Sequence[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    """Undo `split_by_slot`: [n, ...] of each part to [N, ...]."""
    if order is None:
        return outputs[0]
    return _JoinBySource.apply(order.split([len(output) for output in outputs]), *outputs)


class _SplitBySlot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: Sequence[torch.Tensor]) -> Any:
        ctx.save_for_backward(*order)
        return tuple(rows.index_select(0, part) for part in order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _put_back(grads, ctx.saved_tensors), None


class _JoinBySource(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: Sequence[torch.Tensor], *outputs: torch.Tensor) -> Any:
        ctx.save_for_backward(*order)
        return _put_back(outputs, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, *(grad.index_select(0, part) for part in ctx.saved_tensors)


def _put_back(parts: Sequence[torch.Tensor], order: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put the rows [n, ...] of each part where `order` [n] says: [N, ...]."""
    rows = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for part, places in zip(parts, order, strict=True):
        part = part.contiguous()
        word = _find_word(part)
        rows.view(word).index_copy_(0, places, part.view(word))
    return rows


def _find_word(rows: torch.Tensor) -> torch.dtype:
    """The dtype to move rows [n, H] in: `index_copy_` moves one number at a time.

    In words of 16 bytes it is as fast on a CPU as `index_select`. On a GPU, where torch's
    deterministic mode multiplies what it moves by one, words must be integers.
    """
    word = torch.int64 if rows.is_cuda else torch.complex128
    per_word = word.itemsize // rows.dtype.itemsize
    whole = rows.ndim > 1 and not (rows.shape[-1] % per_word or rows.storage_offset() % per_word)
    return word if whole else rows.dtype
