"""Tokens spread over the replicas of their experts; `planner.replicas` has the idea.

Shape letters: D replicas of every expert, P ranks of one expert-parallel group, M = E / P native
experts a rank, R sources, S = R / D of them a row. Rank (d, p) has number d * P + p, replica d of
expert e number d * E + e.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import largest_of, total_of, zero_table, zeros
from megatron_llep.planner.loops.jit import entry, helper


@entry
def spread_tokens(
    counts: np.ndarray, load: np.ndarray, num_replicas: int, lends: bool
) -> np.ndarray:
    """Choose the replica of every token, with as few as possible out of the row of their source.

    Of a rank's own tokens those that leave do so last: they are the ones that need not cross the
    wire. The others leave by source and expert, and fill the rows from the first on.

    Args:
        counts: int64 [R, E] tokens of each source to each expert.
        load: int64 [D * P] tokens of each rank if all stay in their row.
        num_replicas: D.
        lends: whether experts are lent afterwards.

    Returns:
        int64 [R, D * E] tokens of each source to each replica.
    """
    R, E = counts.shape
    D = num_replicas
    S, P = R // D, len(load) // D
    M, tp = E // P, S // P
    spread = stay_in_row(counts, D)
    target = set_targets(load, D, lends)
    room = zeros(len(load))
    for rank in range(len(load)):
        room[rank] = max(target[rank] - load[rank], 0)
    for p in range(P):
        into = 0
        for d in range(D):
            surplus = load[d * P + p] - target[d * P + p]
            for i in range(S if surplus > 0 else 0):
                source = d * S + ((p + 1) * tp + i) % S
                for expert in range(p * M, (p + 1) * M):
                    leaving = min(counts[source, expert], surplus)
                    surplus -= leaving
                    while leaving:
                        while room[into * P + p] == 0:
                            into += 1
                        tokens = min(leaving, room[into * P + p])
                        room[into * P + p] -= tokens
                        leaving -= tokens
                        spread[source, d * E + expert] -= tokens
                        spread[source, into * E + expert] += tokens
    return spread


@entry
def stay_in_row(counts: np.ndarray, num_replicas: int) -> np.ndarray:
    """Send all tokens to the replica in the row of their source: [R, D * E] from [R, E]."""
    R, E = counts.shape
    spread = zero_table(R, num_replicas * E)
    for source in range(R):
        row = source // (R // num_replicas)
        for expert in range(E):
            spread[source, row * E + expert] = counts[source, expert]
    return spread


@helper
def set_targets(load: np.ndarray, num_replicas: int, lends: bool) -> np.ndarray:
    """The most tokens that each rank shall keep or take from its replicas: [D * P] from [D * P].

    Without lending it is the least largest load that there can be: no token moves that need not
    for that. With lending it is the mean. In both, ranks p with more than that in all their
    replicas share it equally; then no replica of what one rank lends is below the mean load: it
    would borrow what it holds.
    """
    D, P = num_replicas, len(load) // num_replicas
    total = zeros(P)
    for rank in range(D * P):
        total[rank % P] += load[rank]
    all_tokens = total_of(total)
    most_shared = (largest_of(total) + D - 1) // D
    target = zeros(D * P)
    for rank in range(D * P):
        even = all_tokens // (D * P) + (rank < all_tokens % (D * P))
        target[rank] = even if lends else most_shared
    for p in range(P):
        can_take = 0
        for d in range(D):
            can_take += target[d * P + p]
        if total[p] > can_take:
            for d in range(D):
                target[d * P + p] = total[p] // D + (d < total[p] % D)
    return target


@entry
def keep_own_replicas(
    quota: np.ndarray, spread: np.ndarray, transfers: np.ndarray, num_replicas: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where a rank borrows an expert that it has a replica of, send it the tokens alone.

    Args:
        quota: int64 [D * E, D * P], of a plan.
        spread: int64 [R, D * E] tokens of each source to each replica, which it is for.
        transfers: int64 [n, 3], of the plan.
        num_replicas: D.

    Returns:
        quota and spread with these tokens at the borrower's own replica.
    """
    quota, spread = quota.copy(), spread.copy()
    R, P = len(spread), quota.shape[1] // num_replicas
    E = len(quota) // num_replicas
    S = R // num_replicas
    for i in range(len(transfers)):
        lent, home, borrower = transfers[i, 0], transfers[i, 1], transfers[i, 2]
        if home % P != borrower % P:
            continue
        row = borrower // P
        own = row * E + lent % E
        tokens = quota[lent, borrower]
        quota[lent, borrower] = 0
        quota[own, borrower] += tokens
        for k in range(R):  # those in the borrower's row first
            source = (row * S + k) % R
            moved = min(spread[source, lent], tokens)
            spread[source, lent] -= moved
            spread[source, own] += moved
            tokens -= moved
    return quota, spread
