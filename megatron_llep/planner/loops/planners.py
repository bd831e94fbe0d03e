"""The planners, by name: from counts to all tables of a plan.

Shape letters: P ranks, E experts, S foreign slots per rank, n transfers.

All take:
    counts: int64 [P, E] tokens of each rank for each expert.
    max_foreign: most foreign experts per rank, 0 .. E / P.
    node_size: ranks on a node; divides P.
    lends_across: whether experts may be lent to other nodes.
    threshold: the imbalance below which nothing is lent.
    falls_back: whether to lend nothing if the largest load would not fall.

All return quota [E, P], foreign_experts [P, S] and transfers [n, 3] as in `Plan`; the smallest
count, and where that is negative nothing else has a meaning; all tokens; the largest load of a rank
before and after.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import largest_of, total_of
from megatron_llep.planner.loops.exact import exact_moves
from megatron_llep.planner.loops.jit import entry, helper
from megatron_llep.planner.loops.lla import lla_moves
from megatron_llep.planner.loops.moves import new_moves
from megatron_llep.planner.loops.node_ranks import list_loans
from megatron_llep.planner.loops.nodes import plan_ranks
from megatron_llep.planner.loops.plan import give_slots, give_tables, sum_nodes, sum_ranks, sum_up
from megatron_llep.planner.loops.tolerant import most_tokens, tolerant_moves

Tables = tuple[np.ndarray, np.ndarray, np.ndarray, int, int, int, int]


@entry
def tolerant(
    counts: np.ndarray,
    max_foreign: int,
    node_size: int,
    lends_across: bool,
    threshold: float,
    falls_back: bool,
    tolerance: float,
) -> Tables:
    """With `tolerant_moves`."""
    loads, load, smallest, before, moves, n = begin(counts, max_foreign)
    if smallest >= 0 and is_uneven(load, threshold):
        group_size = len(load) if lends_across else node_size
        n = tolerant_moves(loads, load, max_foreign, group_size, tolerance, moves)
    return finish(loads, load, smallest, before, moves, n, falls_back)


@entry
def exact(
    counts: np.ndarray,
    max_foreign: int,
    node_size: int,
    lends_across: bool,
    threshold: float,
    falls_back: bool,
) -> Tables:
    """With `exact_moves`."""
    loads, load, smallest, before, moves, n = begin(counts, max_foreign)
    if smallest >= 0 and is_uneven(load, threshold):
        group_size = len(load) if lends_across else node_size
        n = exact_moves(loads, load, max_foreign, group_size, moves)
    return finish(loads, load, smallest, before, moves, n, falls_back)


@entry
def nodes(
    counts: np.ndarray,
    max_foreign: int,
    node_size: int,
    threshold: float,
    falls_back: bool,
    tolerance: float,
    prices: np.ndarray,
) -> Tables:
    """With `plan_ranks`, or `exact_moves` where these leave a rank less.

    Loans may be there for links alone, so `falls_back` is about plans that leave a rank more pairs
    than the tolerance allows.

    Args:
        counts: as for all, and the rest but one.
        max_foreign: likewise.
        node_size: likewise.
        threshold: likewise.
        falls_back: likewise.
        tolerance: part of the mean by which a rank's load may exceed it.
        prices: of loans, as for `spread_over_nodes`.
    """
    tokens, smallest = sum_nodes(counts, node_size)
    loads, load = sum_ranks(tokens, len(counts))
    P, E = counts.shape
    before = largest_of(load)
    moves, n = new_moves(P * max_foreign), 0
    if smallest < 0 or not is_uneven(load, threshold):
        return finish(loads, load, smallest, before, moves, n, falls_back)
    most = most_tokens(load, P, tolerance)
    ranks = plan_ranks(tokens, P, max_foreign, most, prices, 1)
    largest = largest_of(ranks.load)
    if largest > most:  # for want of slots
        ranks = plan_ranks(tokens, P, max_foreign, most, prices, 3)
        largest = largest_of(ranks.load)
    if largest > most:
        n = exact_moves(loads, load, max_foreign, P, moves)
        if max(largest_of(load), most) < largest or (falls_back and largest > before):
            return finish(loads, load, smallest, before, moves, n, falls_back)
    moves = list_loans(ranks)
    foreign_experts, transfers = give_slots(E, P, moves, len(moves))
    return ranks.quota, foreign_experts, transfers, smallest, total_of(loads), before, largest


@entry
def lla(
    counts: np.ndarray,
    max_foreign: int,
    node_size: int,
    lends_across: bool,
    threshold: float,
    falls_back: bool,
    capacity_factor: float,
    min_tokens_per_gemm: int,
) -> Tables:
    """With `lla_moves`."""
    loads, load, smallest, before, moves, n = begin(counts, max_foreign)
    if smallest >= 0 and is_uneven(load, threshold):
        limits = max_foreign, node_size, lends_across
        n = lla_moves(loads, load, *limits, capacity_factor, min_tokens_per_gemm, moves)
    return finish(loads, load, smallest, before, moves, n, falls_back)


@entry
def lp(
    counts: np.ndarray,
    max_foreign: int,
    node_size: int,
    lends_across: bool,
    threshold: float,
    falls_back: bool,
) -> Tables:
    """Lends nothing."""
    loads, load, smallest, before, moves, n = begin(counts, max_foreign)
    return finish(loads, load, smallest, before, moves, n, falls_back)


@helper
def begin(
    counts: np.ndarray, max_foreign: int
) -> tuple[np.ndarray, np.ndarray, int, int, np.ndarray, int]:
    """Loads [E] and [P], the smallest count, the largest load, room for moves, and no move yet."""
    loads, load, smallest = sum_up(counts)
    return loads, load, smallest, largest_of(load), new_moves(len(load) * max_foreign), 0


@helper
def is_uneven(load: np.ndarray, threshold: float) -> bool:
    """Whether the imbalance of loads [P] reaches the threshold."""
    total = total_of(load)
    return (largest_of(load) * len(load) / total if total else 1.0) >= threshold


@helper
def finish(
    loads: np.ndarray,
    load: np.ndarray,
    smallest: int,
    before: int,
    moves: np.ndarray,
    n: int,
    falls_back: bool,
) -> Tables:
    """What a planner returns, after n moves."""
    after = largest_of(load)
    if falls_back and after >= before:
        n, after = 0 * n, before
    quota, foreign_experts, transfers = give_tables(loads, len(load), moves, n)
    return quota, foreign_experts, transfers, smallest, total_of(loads), before, after
