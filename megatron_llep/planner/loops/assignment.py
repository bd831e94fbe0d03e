"""Whose tokens of an expert go to which of its holders; `planner.assignment` has the rules.

Shape letters: P ranks, E experts, M = E / P native and S foreign slots per rank. R = P * tp
sources: source r belongs to rank r // tp.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zero_table, zeros
from megatron_llep.planner.loops.jit import entry, helper


@entry
def count_sends(
    counts: np.ndarray,
    quota: np.ndarray,
    transfers: np.ndarray,
    source: int,
    node_size: int,
    local_first: bool,
) -> np.ndarray:
    """[E, P] tokens of each expert that one source sends to each rank.

    Args:
        counts: int64 [R, E] tokens of each source for each expert.
        quota: int64 [E, P], of a plan.
        transfers: int64 [n, 3], of the same.
        source: 0 .. R-1.
        node_size: ranks on a node; divides P.
        local_first: the order; else `rank_order`.
    """
    R, E = counts.shape
    P = quota.shape[1]
    own = source // (R // P)
    sends = zero_table(E, P)
    for expert in range(E):
        sends[expert, expert // (E // P)] = counts[source, expert]
    from_sources = zeros(R)
    is_lent = zeros(E)
    for i in range(len(transfers)):
        is_lent[transfers[i, 0]] = 1
    for expert in range(E):
        if is_lent[expert] and counts[source, expert]:
            give_out(
                counts,
                quota,
                expert,
                node_size,
                local_first,
                source,
                own,
                sends[expert],
                from_sources,
            )
    return sends


@entry
def count_receives(
    counts: np.ndarray,
    quota: np.ndarray,
    foreign_experts: np.ndarray,
    rank: int,
    node_size: int,
    local_first: bool,
) -> np.ndarray:
    """[R, M + S] tokens that one rank receives from each source for each of its slots.

    Args:
        counts: int64 [R, E] tokens of each source for each expert.
        quota: int64 [E, P], of a plan.
        foreign_experts: int64 [P, S], of the same.
        rank: 0 .. P-1.
        node_size: ranks on a node; divides P.
        local_first: the order; else `rank_order`.
    """
    R, E = counts.shape
    P, S = foreign_experts.shape
    M = E // P
    first = rank * (R // P)
    receives = zero_table(R, M + S)
    to_ranks, from_sources = zeros(P), zeros(R)
    for slot in range(M + S):
        expert = rank * M + slot if slot < M else foreign_experts[rank, slot - M]
        if expert >= 0 and quota[expert, rank]:
            give_out(
                counts, quota, expert, node_size, local_first, first, rank, to_ranks, from_sources
            )
            for source in range(R):
                receives[source, slot] = from_sources[source]
    return receives


@helper
def give_out(
    counts: np.ndarray,
    quota: np.ndarray,
    expert: int,
    node_size: int,
    local_first: bool,
    source: int,
    rank: int,
    to_ranks: np.ndarray,
    from_sources: np.ndarray,
) -> None:
    """Give the tokens of one expert to its holders.

    Writes what `source` sends to each rank into `to_ranks` [P], and what `rank` gets of each source
    into `from_sources` [R].
    """
    R, P = len(counts), quota.shape[1]
    rest, room = zeros(R), zeros(P)
    for r in range(R):
        rest[r], from_sources[r] = counts[r, expert], 0
    for g in range(P):
        room[g], to_ranks[g] = quota[expert, g], 0
    reach = 1 if local_first else P
    while True:
        # Tokens stay among so many ranks: what is left of the sources, in their order, fills what
        # is left of the quotas, in rank order.
        num_sources = R // P * reach
        for group in range(P // reach):
            g = group * reach
            last = g + reach
            for r in range(group * num_sources, (group + 1) * num_sources):
                while rest[r] and g < last:
                    tokens = min(rest[r], room[g])
                    rest[r] -= tokens
                    room[g] -= tokens
                    if r == source:
                        to_ranks[g] += tokens
                    if g == rank:
                        from_sources[r] += tokens
                    if room[g] == 0:
                        g += 1
        if reach == P:
            break
        reach = P if reach == node_size else node_size
