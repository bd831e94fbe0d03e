"""What one source sends and its rank receives under a plan, and in which order.

Shape letters: D replicas of an expert (1, unless tokens are spread over replicas), P ranks,
E experts, replica-major, M = E / P native and S foreign slots per rank. R = P * tp sources: source
r belongs to rank r // tp. C chunks, a source's pairs of one (expert, holder).
"""

import numpy as np

from megatron_llep.planner.loops.arrays import total_of, zero_table, zeros
from megatron_llep.planner.loops.assignment import give_out
from megatron_llep.planner.loops.jit import entry


@entry
def list_exchange(
    counts: np.ndarray,
    quota: np.ndarray,
    foreign_experts: np.ndarray,
    transfers: np.ndarray,
    source: int,
    num_replicas: int,
    node_size: int,
    local_first: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Chunks by the slot they go to, rows to each rank, and rows that come.

    Args:
        counts: int64 [R, E] tokens of each source for each expert.
        quota: int64 [E, P], of a plan.
        foreign_experts: int64 [P, S], of the same.
        transfers: int64 [n, 3], of the same.
        source: 0 .. R-1.
        num_replicas: D.
        node_size: ranks on a node; divides P.
        local_first: the order of `planner.assignment`; else `rank_order`.

    Returns:
        [3, C] first pair, when pairs are ordered by expert, then replica, length and physical slot
        of each chunk that is not empty; [P] pairs to each rank; [tp, P] pairs from each source, in
        all and [tp, P, M + S] for each slot of its rank.
    """
    R, E = counts.shape
    P, S = foreign_experts.shape
    M, tp = E // P, R // P
    # Of lent experts: which row of `shares`, the pairs for each rank, and of `coming`, those that
    # this rank gets from each source.
    row_of, num_lent = np.full(E, -1), 0
    shares = np.empty((len(transfers), P), np.int64)
    coming = np.empty((len(transfers), R), np.int64)
    for i in range(len(transfers)):
        expert = transfers[i, 0]
        if row_of[expert] < 0:
            row_of[expert] = num_lent
            give_out(
                counts,
                quota,
                expert,
                node_size,
                local_first,
                source,
                source // tp,
                shares[num_lent],
                coming[num_lent],
            )
            num_lent += 1
    first, num_pairs = np.empty(E, np.int64), 0
    for one in range(E // num_replicas):
        for expert in range(one, E, E // num_replicas):
            first[expert] = num_pairs
            num_pairs += counts[source, expert]
    sent = zeros(P)
    chunks, C = np.empty((3, E + len(transfers)), np.int64), 0
    for rank in range(P):
        for slot in range(M + S):
            expert = rank * M + slot if slot < M else foreign_experts[rank, slot - M]
            if expert < 0:
                break
            row = row_of[expert]
            pairs = counts[source, expert] if row < 0 else shares[row, rank]
            if pairs:
                # An expert's pairs are given out in rank order.
                chunks[0, C], chunks[1, C] = first[expert], pairs
                chunks[2, C] = rank * (M + S) + slot
                first[expert] += pairs
                sent[rank] += pairs
                C += 1
    assert total_of(sent) == num_pairs, (
        "the plan sends tokens to a rank that does not hold their expert"
    )
    received, by_slot = zero_table(tp, P), np.empty((tp, P, M + S), np.int64)
    own = source // tp
    for slot in range(M + S):
        expert = own * M + slot if slot < M else foreign_experts[own, slot - M]
        for r in range(R):
            pairs = 0
            if expert >= 0:
                row = row_of[expert]
                pairs = counts[r, expert] if row < 0 else coming[row, r]
            by_slot[r % tp, r // tp, slot] = pairs
            received[r % tp, r // tp] += pairs
    return chunks[:, :C].copy(), sent, received, by_slot
