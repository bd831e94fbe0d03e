"""From counts to the tables of a plan: loads, moves, quotas, slots, transfers.

Shape letters: P ranks, E experts, M = E / P experts native to a rank, S foreign slots per rank,
n transfers.
"""

import numpy as np
from numba import njit

from megatron_llep.planner.loops.exact import exact_moves
from megatron_llep.planner.loops.lla import lla_moves
from megatron_llep.planner.loops.moves import set_move
from megatron_llep.planner.loops.queue import insert
from megatron_llep.planner.loops.sums import largest_of, total_of
from megatron_llep.planner.loops.tolerant import tolerant_moves

TOLERANT, EXACT, LLA, LP = range(4)
"""Numbers of planners; LP lends nothing, as it spreads tokens over replicas, before this."""


@njit
def plan_counts(
    counts: np.ndarray,
    planner: int,
    max_foreign: int,
    node_size: int,
    lends_across: bool,
    capacity_factor: float,
    min_tokens_per_gemm: int,
    threshold: float,
    tolerance: float,
    falls_back: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int, int, int]:
    """Plan, or fall back to plain expert parallelism, as `make_plan` says.

    Args:
        counts: int64 [P, E] tokens of each rank for each expert.
        planner: `TOLERANT`, `EXACT`, `LLA` or `LP`.
        max_foreign: most foreign experts per rank, 0 .. M.
        node_size: ranks on a node; divides P.
        lends_across: whether experts may be lent to other nodes.
        capacity_factor: of `lla_moves`.
        min_tokens_per_gemm: of `lla_moves`.
        threshold: the imbalance below which nothing is lent.
        tolerance: of `tolerant_moves`.
        falls_back: lend nothing if the largest load would not fall.

    Returns:
        quota [E, P], foreign_experts [P, S] and transfers [n, 3] as in `Plan`; the smallest count,
        all tokens, and the largest load of a rank before and after.
    """
    P, E = counts.shape
    loads, smallest = _sum_up(counts)
    load = np.zeros(P, np.int64)
    for expert in range(E):
        load[expert // (E // P)] += loads[expert]
    total, before = total_of(load), largest_of(load)
    moves = np.empty((P * max_foreign, 3), np.int64)
    n = 0
    imbalance = before * P / total if total else 1.0
    if smallest >= 0 and imbalance >= threshold:
        if planner == TOLERANT:
            n = tolerant_moves(loads, load, max_foreign, node_size, lends_across, tolerance, moves)
        elif planner == EXACT:
            n = exact_moves(loads, load, max_foreign, node_size, lends_across, moves)
        elif planner == LLA:
            n = lla_moves(
                loads,
                load,
                max_foreign,
                node_size,
                lends_across,
                capacity_factor,
                min_tokens_per_gemm,
                moves,
            )
        if falls_back and largest_of(load) >= before:
            n = 0
    after = largest_of(load) if n else before
    quota = give_quotas(loads, P, moves[:n])
    foreign_experts, transfers = give_slots(E, P, moves[:n])
    return quota, foreign_experts, transfers, smallest, total, before, after


@njit
def _sum_up(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Tokens of each expert [E] from counts [P, E]; and the smallest count."""
    P, E = counts.shape
    loads = np.zeros(E, np.int64)
    smallest = counts[0, 0]
    for rank in range(P):
        for expert in range(E):
            tokens = counts[rank, expert]
            loads[expert] += tokens
            smallest = min(smallest, tokens)
    return loads, smallest


@njit
def give_quotas(loads: np.ndarray, P: int, moves: np.ndarray) -> np.ndarray:
    """[E, P] tokens of each expert that each rank computes, if those of the moves leave home.

    Args:
        loads: int64 [E] tokens per expert.
        P: number of ranks.
        moves: int64 [n, 3], at most one for an expert and a borrower.
    """
    E = len(loads)
    M = E // P
    quota = np.zeros((E, P), np.int64)
    for expert in range(E):
        quota[expert, expert // M] = loads[expert]
    for i in range(len(moves)):
        expert, borrower, tokens = moves[i, 0], moves[i, 1], moves[i, 2]
        quota[expert, expert // M] -= tokens
        quota[expert, borrower] += tokens
    return quota


@njit
def give_slots(E: int, P: int, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """foreign_experts [P, S] and transfers [n, 3] of a plan, from its moves [n, 3]."""
    M = E // P
    num_foreign = np.zeros(P, np.int64)
    start = np.zeros(P + 1, np.int64)  # of each home's transfers
    for i in range(len(moves)):
        start[moves[i, 0] // M + 1] += 1
        num_foreign[moves[i, 1]] += 1
    for home in range(P):
        start[home + 1] += start[home]
    S = largest_of(num_foreign)
    held = np.zeros((P, S + 1), np.int64)  # a queue for each rank
    for i in range(len(moves)):
        insert(held[moves[i, 1]], moves[i, 0])
    foreign_experts = np.full((P, S), -1)
    transfers = np.empty((len(moves), 3), np.int64)
    for borrower in range(P):
        for i in range(num_foreign[borrower]):
            expert = held[borrower, i + 1]
            foreign_experts[borrower, i] = expert
            home = expert // M
            transfers[start[home], 0] = expert
            transfers[start[home], 1] = home
            transfers[start[home], 2] = borrower
            start[home] += 1
    return foreign_experts, transfers


@njit
def read_quotas(
    quota: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int, int, int]:
    """What follows from quotas int64 [E, P].

    Returns:
        foreign_experts [P, S] and transfers [n, 3] as in `Plan`; all tokens, and the largest load
        of a rank before and after.
    """
    E, P = quota.shape
    M = E // P
    before, after = np.zeros(P, np.int64), np.zeros(P, np.int64)
    n = 0
    for expert in range(E):
        for rank in range(P):
            tokens = quota[expert, rank]
            before[expert // M] += tokens
            after[rank] += tokens
            n += tokens != 0 and rank != expert // M
    moves = np.empty((n, 3), np.int64)
    n = 0
    for expert in range(E):
        for rank in range(P):
            if quota[expert, rank] and rank != expert // M:
                set_move(moves, n, expert, rank, quota[expert, rank])
                n += 1
    foreign_experts, transfers = give_slots(E, P, moves)
    return foreign_experts, transfers, total_of(before), largest_of(before), largest_of(after)
