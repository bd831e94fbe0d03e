"""Rows that arrived at a rank: from the order of their sources to that of its slots, and back.

Letters: R sources, M native and S foreign slots, N rows, n rows of a part of the slots.

A *part* is some slots that follow each other, whose rows are computed together. Each part gets a
tensor of its own: cut out of one for all slots, and joined again, every row would be copied once
more in forward and in backward.
"""

from collections.abc import Sequence

import torch


def split_by_slot(
    rows: torch.Tensor, counts: torch.Tensor, parts: Sequence[int]
) -> list[torch.Tensor]:
    """Sort rows by slot, then source.

    Args:
        rows: [N, ...], by source, then slot.
        counts: int [R, M + S] on the host, rows of each source for each slot.
        parts: how many slots each part has; M + S in all.

    Returns:
        [n, ...] of each part; of no rows, but on the way of the gradients, if it has no slots.
    """
    num_sources, num_slots = counts.shape
    if tuple(parts) == (1,):  # sorted already; as in Megatron, nothing is copied
        return [rows]
    chunks = rows.split(counts.ravel().tolist())
    found, first = [], 0
    for size in parts:
        slots = range(first, first + size)
        chosen = [chunks[r * num_slots + slot] for slot in slots for r in range(num_sources)]
        found.append(torch.cat(chosen or [rows[:0]]))
        first += size
    return found


def join_by_source(
    outputs: Sequence[torch.Tensor], counts: torch.Tensor, parts: Sequence[int]
) -> torch.Tensor:
    """Undo `split_by_slot`: [n, ...] of each part to [N, ...]."""
    num_sources, num_slots = counts.shape
    if tuple(parts) == (1,):
        return outputs[0]
    sizes = counts.T.split(list(parts))
    chunks: list[torch.Tensor] = []  # by slot, then source
    slotless = []
    for output, of_part in zip(outputs, sizes, strict=True):
        if len(of_part):
            chunks += output.split(of_part.ravel().tolist())
        else:
            slotless.append(output)
    by_source = [
        chunks[slot * num_sources + r] for r in range(num_sources) for slot in range(num_slots)
    ]
    return torch.cat(by_source + slotless)
