"""Perfect balance with one lender per borrower.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

from bisect import insort

import numpy as np

from megatron_llep.planner.plan import PlanMove
from megatron_llep.planner.topology import ONE_NODE, Topology


def exact_moves(
    loads: np.ndarray, rank_loads: list[int], max_foreign: int, topology: Topology = ONE_NODE
) -> list[PlanMove]:
    """Moves with which every rank computes total // P tokens, or one more.

    1. Each rank's cap is its even share (`even_shares`). While a rank is above its cap, the rank
       furthest above lends to the rank furthest below and fills it completely. The lender may
       fall below its own cap; it then borrows later, once.
    2. Each lender serves its borrowers in the order of step 1, which is the largest need first,
       always from its expert with the most tokens left.

    Lowest ids win ties. A borrower has one lender, so at most M foreign experts; each move
    uses up an expert or fills a borrower, so there are at most E + P - 1. After the planner
    published with MoonEP (MoonshotAI/MoonEP).

    With several nodes, step 1 goes through the nodes first, each among its own ranks, and then
    through what is left of all; where lending across nodes is ruled out, each node balances
    itself.

    With `max_foreign` < M a borrower that holds that many experts gets no further one: the
    tokens it should have taken stay at their home, and if that home was to borrow, it borrows
    so much less. Balance is then no longer perfect, but no rank is left with more than the
    larger of its cap and its load under plain expert parallelism.

    Args:
        loads: int64 [E] tokens per expert.
        rank_loads: [P] tokens per rank under plain expert parallelism.
        max_foreign: most foreign experts per rank, 0 .. M.
        topology: `ranks_per_node` divides P.
    """
    M = len(loads) // len(rank_loads)
    moves: list[PlanMove] = []
    needs: dict[int, list[tuple[int, int]]] = {}
    unlent = [0] * len(rank_loads)  # tokens that a rank was to lend and keeps for want of slots

    def serve_borrowers(lender: int) -> None:
        first = lender * M
        left = loads[first : first + M].tolist()
        for borrower, need in needs.pop(lender):
            slots = max_foreign
            while need and slots:
                most = max(left)
                expert = left.index(most)
                moved = min(need, most)
                left[expert] = most - moved
                moves.append((first + expert, borrower, moved))
                need -= moved
                slots -= 1
            unlent[lender] += need

    # All that a rank lends precedes what it borrows: when it borrows, its lending can be settled.
    for lender, borrower, need in match_ranks(rank_loads, topology):
        if borrower in needs:
            serve_borrowers(borrower)
        kept = min(need, unlent[borrower])
        unlent[lender] += kept
        if need > kept:
            needs.setdefault(lender, []).append((borrower, need - kept))
    for lender in list(needs):
        serve_borrowers(lender)
    return moves


def even_shares(rank_loads: list[int], topology: Topology) -> list[int]:
    """[P] tokens each rank has when those that may lend to each other share evenly.

    What does not divide goes to the first ranks, one token each.
    """
    P = len(rank_loads)
    size = P if topology.lend_across_nodes else topology.node_size(P)
    shares = []
    for first in range(0, P, size):
        share, extra = divmod(sum(rank_loads[first : first + size]), size)
        shares += [share + 1] * extra + [share] * (size - extra)
    return shares


def match_ranks(rank_loads: list[int], topology: Topology) -> list[tuple[int, int, int]]:
    """Pair ranks above their even share with ranks below it.

    Returns (lender, borrower, tokens) in the order they were matched; a rank is the borrower of
    at most one.
    """
    P = len(rank_loads)
    size = topology.node_size(P)
    groups = [range(first, first + size) for first in range(0, P, size)]
    if topology.lend_across_nodes and size < P:
        groups.append(range(P))
    shares = even_shares(rank_loads, topology)
    surplus = [load - share for load, share in zip(rank_loads, shares, strict=True)]
    matches = []
    for group in groups:
        above = sorted([(surplus[rank], -rank) for rank in group if surplus[rank] > 0])
        below = sorted([(-surplus[rank], -rank) for rank in group if surplus[rank] < 0])
        while above and below:
            excess, minus_lender = above.pop()
            need, minus_borrower = below.pop()
            matches.append((-minus_lender, -minus_borrower, need))
            rest = excess - need
            surplus[-minus_lender], surplus[-minus_borrower] = rest, 0
            if rest > 0:
                insort(above, (rest, minus_lender))
            elif rest < 0:
                insort(below, (-rest, minus_lender))
    return matches
