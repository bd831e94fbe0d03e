"""Placement: a source's tokens -> the physical slots that the plan gives them.

Letters: T tokens of this rank, E experts, D replicas of an expert (1, unless tokens are spread over
replicas), P ranks, M native slots a rank, S foreign slots a rank, N (token, expert) pairs of this
rank, C chunks.

A pair's *physical slot* is `rank * (M + S) + slot`. For each expert the plan tells how many of
this rank's pairs go to each holder; pairs of one expert are given out in token order. Pairs of one
(expert, holder) therefore stay together, as a *chunk*, and placing tokens means reordering chunks:
no sort over tokens is needed.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The order in which one rank sends its (token, expert) pairs: by slot, then by token."""

    token_index: torch.Tensor
    """int64 [N]: row of the pair's token in the hidden states [T, H]."""
    pair_index: torch.Tensor
    """int64 [N]: position of the pair in the flattened routing map [T, E]."""


def order_chunks(
    sends: np.ndarray, slot_of_expert: np.ndarray, slots_per_rank: int, num_replicas: int = 1
) -> np.ndarray:
    """Order the chunks of pairs by physical slot.

    Args:
        sends: int [D * E, P], pairs of this source for each replica of each expert and holder,
            replica-major.
        slot_of_expert: int [P, D * E], the slot that holds the replica on that rank, -1 if none
            does.
        slots_per_rank: M + S.
        num_replicas: D.

    Returns:
        int64 [2, C]: first pair (in expert-major order) and length of each non-empty chunk.
    """
    if num_replicas > 1:
        # Expert-major, as the pairs are.
        rows = np.arange(len(sends)).reshape(num_replicas, -1).T.ravel()
        sends, slot_of_expert = sends[rows], slot_of_expert[:, rows]
    expert, rank = np.nonzero(sends)
    length = sends[expert, rank]
    first = np.cumsum(length) - length
    slot = slot_of_expert[rank, expert]
    assert (slot >= 0).all(), "the plan sends tokens to a rank that does not hold their expert"
    order = np.argsort(rank * slots_per_rank + slot, kind="stable")
    return np.stack((first[order], length[order])).astype(np.int64, copy=False)


def place_tokens(routing_map: torch.Tensor, chunks: np.ndarray) -> Placement:
    """Order this rank's (token, expert) pairs by physical slot, without a host sync.

    Args:
        routing_map: bool [T, E], the router's choice.
        chunks: int64 [2, C] from `order_chunks`; lengths sum to the pairs in `routing_map`.
    """
    num_tokens, num_experts = routing_map.shape
    device = routing_map.device
    num_pairs = int(chunks[1].sum())
    # Transposed, the pairs come expert by expert, in token order within each.
    by_expert = routing_map.T.reshape(-1).nonzero_static(size=num_pairs).squeeze(1)
    first, length = torch.from_numpy(chunks).to(device, non_blocking=True)
    shift = first - (length.cumsum(0) - length)
    row = torch.arange(num_pairs, device=device)
    row += shift.repeat_interleave(length, output_size=num_pairs)
    pair = by_expert.index_select(0, row)
    token = pair % num_tokens
    expert = pair // num_tokens
    return Placement(token_index=token, pair_index=token * num_experts + expert)
