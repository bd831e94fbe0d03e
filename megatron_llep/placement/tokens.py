"""Which (token, expert) pair goes where in the order of sending: on the CPU.

Letters: T tokens of this rank, E experts, N (token, expert) pairs of this rank, C chunks.
"""

import numpy as np
import torch

from megatron_llep.placement.pairs import Pairs, Placement
from megatron_llep.planner import compiled


def list_pairs(routing_map: torch.Tensor, size: int) -> Pairs:
    """List this rank's pairs expert by expert, without a host sync.

    Args:
        routing_map: bool [T, E], the router's choice.
        size: N or more; what is listed beyond N has no meaning. If less, the list is cut.
    """
    if routing_map.is_cuda:
        from megatron_llep.placement import kernel

        return kernel.list_pairs(routing_map, size)
    num_tokens, num_experts = routing_map.shape
    # Transposed, the pairs come expert by expert, in token order within each.
    by_expert = routing_map.T.reshape(-1).nonzero_static(size=size).squeeze(1)
    expert = by_expert // max(num_tokens, 1)
    return Pairs(pair_index=(by_expert - expert * num_tokens) * num_experts + expert)


def place_tokens(
    routing_map: torch.Tensor, chunks: np.ndarray, pairs: Pairs | None = None
) -> Placement:
    """Order this rank's (token, expert) pairs by physical slot, without a host sync.

    Args:
        routing_map: bool [T, E], the router's choice.
        chunks: int64 [2 or more, C], first pair and length of each, as in a `TokenExchange`;
            lengths sum to the pairs in `routing_map`.
        pairs: from `list_pairs`, if they are listed already.
    """
    num_experts = routing_map.shape[1]
    num_pairs = sum(chunks[1].tolist())
    if pairs is None or len(pairs.pair_index) < num_pairs:
        pairs = list_pairs(routing_map, num_pairs)
    if routing_map.is_cuda:
        from megatron_llep.placement import kernel

        return kernel.place_pairs(pairs, chunks, num_experts)
    place = compiled("chunks.place_pairs")
    token_index, pair_index = place(
        np.ascontiguousarray(chunks), pairs.pair_index.numpy(), num_experts
    )
    return Placement(
        token_index=torch.from_numpy(token_index), pair_index=torch.from_numpy(pair_index)
    )
