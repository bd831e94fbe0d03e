"""Perfect balance with one lender per borrower.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

from heapq import heapify, heappop, heappush, heapreplace

import numpy as np


def exact_quota(loads: np.ndarray, num_ranks: int, max_foreign: int) -> np.ndarray:
    """Quotas with which every rank computes total // P tokens, or one more.

    1. `cap[r]` is total // P, and one more on the first total % P ranks. While a rank is above
       its cap, the rank furthest above lends to the rank furthest below and fills it completely.
       The lender may fall below its own cap; it then borrows later, once.
    2. Each lender serves its borrowers in the order of step 1, which is the largest need first,
       always from its expert with the most tokens left.

    Lowest ids win ties. A borrower has one lender, so at most M foreign experts; each transfer
    uses up an expert or fills a borrower, so there are at most E + P - 1. After the planner
    published with MoonEP (MoonshotAI/MoonEP).

    With `max_foreign` < M a borrower that holds that many experts gets no further one: the
    tokens it should have taken stay at their home, and if that home was to borrow, it borrows
    so much less. Balance is then no longer perfect, but no rank is left with more than the
    larger of its cap and its load under plain expert parallelism.

    Args:
        loads: int64 [E] tokens per expert.
        num_ranks: P, divides E.
        max_foreign: most foreign experts per rank, 0 .. M.

    Returns:
        int64 [E, P] tokens of each expert that each rank computes.
    """
    P = num_ranks
    M = len(loads) // P
    left = loads.tolist()
    rank_loads = loads.reshape(P, M).sum(axis=1).tolist()
    experts: list[int] = []
    borrowers: list[int] = []
    tokens: list[int] = []
    needs: list[list[tuple[int, int]]] = [[] for _ in range(P)]
    unlent = [0] * P  # tokens that a rank was to lend and keeps for want of slots

    def serve_borrowers(lender: int) -> None:
        native = [(-left[e], e) for e in range(lender * M, (lender + 1) * M) if left[e]]
        heapify(native)
        for borrower, need in needs[lender]:
            slots = max_foreign
            while need and slots:
                most, expert = -native[0][0], native[0][1]
                moved = min(need, most)
                if moved == most:
                    heappop(native)
                else:
                    heapreplace(native, (moved - most, expert))
                left[expert] = most - moved
                experts.append(expert)
                borrowers.append(borrower)
                tokens.append(moved)
                need -= moved
                slots -= 1
            unlent[lender] += need
        needs[lender].clear()

    # All that a rank lends precedes what it borrows: when it borrows, its lending can be settled.
    for lender, borrower, need in _match_ranks(rank_loads):
        if needs[borrower]:
            serve_borrowers(borrower)
        kept = min(need, unlent[borrower])
        unlent[lender] += kept
        if need > kept:
            needs[lender].append((borrower, need - kept))
    for lender in range(P):
        if needs[lender]:
            serve_borrowers(lender)

    quota = np.zeros((P * M, P), dtype=np.int64)
    native_expert = np.arange(P * M)
    quota[native_expert, native_expert // M] = left
    quota[experts, borrowers] = tokens
    return quota


def _match_ranks(rank_loads: list[int]) -> list[tuple[int, int, int]]:
    """Pair ranks above their cap with ranks below it.

    Returns (lender, borrower, tokens) in the order they were matched; a rank is the borrower of
    at most one.
    """
    P = len(rank_loads)
    share, extra = divmod(sum(rank_loads), P)
    above: list[tuple[int, int]] = []
    below: list[tuple[int, int]] = []
    for rank, load in enumerate(rank_loads):
        surplus = load - share - (rank < extra)
        if surplus > 0:
            above.append((-surplus, rank))
        elif surplus < 0:
            below.append((surplus, rank))
    heapify(above)
    heapify(below)
    matches = []
    while above:
        negative_surplus, lender = heappop(above)
        negative_need, borrower = heappop(below)
        matches.append((lender, borrower, -negative_need))
        surplus = negative_need - negative_surplus
        if surplus > 0:
            heappush(above, (-surplus, lender))
        elif surplus < 0:
            heappush(below, (surplus, lender))
    return matches
