"""Perfect balance with one lender per borrower.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.moves import set_move
from megatron_llep.planner.loops.queue import insert, take


@helper
def exact_moves(
    loads: np.ndarray,
    load: np.ndarray,
    max_foreign: int,
    group_size: int,
    moves: np.ndarray,
) -> int:
    """Moves with which every rank computes total // P tokens, or one more.

    Each rank's cap is its even share (`even_shares`). While a rank is above its cap, the rank
    furthest above lends to the rank furthest below and fills it completely, always from its
    expert with the most tokens left. The lender may fall below its own cap; it then borrows
    later, once.

    Lowest ids win ties. A borrower has one lender, so at most M foreign experts; each move
    uses up an expert or fills a borrower, so there are at most E + P - 1. After the planner
    published with MoonEP (MoonshotAI/MoonEP).

    With `max_foreign` < M a borrower that holds that many experts gets no further one: the
    tokens it should have taken stay at their home, and if that home was to borrow, it borrows
    so much less. Balance is then no longer perfect, but no rank is left with more than the
    larger of its cap and its load under plain expert parallelism.

    Args:
        loads: int64 [E] tokens per expert.
        load: int64 [P] tokens per rank under plain expert parallelism; becomes those after.
        max_foreign: most foreign experts per rank, 0 .. M.
        group_size: ranks that lend to each other; divides P.
        moves: int64 [P * max_foreign, 3], filled with rows (expert, borrower, tokens).

    Returns:
        How many moves there are.
    """
    P = len(load)
    surplus = even_shares(load, group_size)
    for rank in range(P):
        surplus[rank] = load[rank] - surplus[rank]
    left = loads.copy()
    unlent = zeros(P)
    n = 0 * P  # no literal, for which numba would compile `_balance` a second time
    for first in range(0, P, group_size):
        n = _balance(first, first + group_size, surplus, left, unlent, load, max_foreign, moves, n)
    return n


@helper
def even_shares(load: np.ndarray, group_size: int) -> np.ndarray:
    """[P] tokens each rank has when groups of so many ranks share evenly.

    What does not divide goes to the first ranks, one token each.
    """
    shares = zeros(len(load))
    for first in range(0, len(load), group_size):
        total = 0
        for i in range(group_size):
            total += load[first + i]
        for i in range(group_size):
            shares[first + i] = total // group_size + (i < total % group_size)
    return shares


@helper
def _balance(
    first: int,
    last: int,
    surplus: np.ndarray,
    left: np.ndarray,
    unlent: np.ndarray,
    load: np.ndarray,
    max_foreign: int,
    moves: np.ndarray,
    n: int,
) -> int:
    """Let ranks above their share fill those below it, as far as that goes among them.

    Args:
        first: of the ranks that lend to each other.
        last: after the last of them.
        surplus: [P] tokens above the even share; updated.
        left: [E] tokens of each expert that are still at its home; updated.
        unlent: [P] tokens that a rank was to lend and keeps for want of slots; updated.
        load: [P] tokens per rank; updated.
        max_foreign: most foreign experts per rank.
        moves: as in `exact_moves`.
        n: moves so far.
    """
    P = len(load)
    M = len(left) // P
    # Turned ids, so that the last one is the lowest id among those with most.
    above, below = zeros(P + 1), zeros(P + 1)
    for rank in range(first, last):
        if surplus[rank] > 0:
            insert(above, surplus[rank] * P + P - 1 - rank)
        elif surplus[rank] < 0:
            insert(below, -surplus[rank] * P + P - 1 - rank)
    while above[0] and below[0]:
        lender = P - 1 - take(above, above[0]) % P
        borrower = P - 1 - take(below, below[0]) % P
        need = -surplus[borrower]
        surplus[lender] -= need
        surplus[borrower] = 0
        if surplus[lender] > 0:
            insert(above, surplus[lender] * P + P - 1 - lender)
        elif surplus[lender] < 0:
            insert(below, -surplus[lender] * P + P - 1 - lender)
        # What the borrower lends is settled: all of it precedes what it borrows.
        kept = min(need, unlent[borrower])
        need -= kept
        slots = max_foreign
        while need and slots:
            expert = most_left(left, lender * M, M)
            tokens = min(need, left[expert])
            left[expert] -= tokens
            load[lender] -= tokens
            load[borrower] += tokens
            set_move(moves, n, expert, borrower, tokens)
            n += 1
            need -= tokens
            slots -= 1
        unlent[lender] += kept + need
    return n


@helper
def most_left(left: np.ndarray, first: int, num_experts: int) -> int:
    """Of so many experts from the first on, the one with most tokens; the lowest id of equals."""
    best = first
    for expert in range(first + 1, first + num_experts):
        if left[expert] > left[best]:
            best = expert
    return best
