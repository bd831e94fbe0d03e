"""From counts to the tables of a plan: loads, moves, quotas, slots, transfers.

Shape letters: P ranks, E experts, M = E / P experts native to a rank, S foreign slots per rank,
n transfers.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import largest_of, total_of, zero_table, zeros
from megatron_llep.planner.loops.jit import entry, helper
from megatron_llep.planner.loops.moves import new_moves, set_move
from megatron_llep.planner.loops.queue import insert


@helper
def sum_up(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Loads of experts and ranks, from counts int64 [P, E].

    Returns:
        Tokens of each expert [E], and of each rank under plain expert parallelism [P]; the
        smallest count.
    """
    P, E = counts.shape
    loads, load = zeros(E), zeros(P)
    smallest = counts[0, 0]
    for rank in range(P):
        for expert in range(E):
            tokens = counts[rank, expert]
            loads[expert] += tokens
            smallest = min(smallest, tokens)
    for expert in range(E):
        load[expert // (E // P)] += loads[expert]
    return loads, load, smallest


@helper
def sum_nodes(counts: np.ndarray, node_size: int) -> tuple[np.ndarray, int]:
    """Tokens of each node for each expert [N, E], from counts int64 [P, E]; the smallest count."""
    P, E = counts.shape
    tokens = zero_table(P // node_size, E)
    smallest = counts[0, 0]
    for rank in range(P):
        of_node = tokens[rank // node_size]
        for expert in range(E):
            of_node[expert] += counts[rank, expert]
            smallest = min(smallest, counts[rank, expert])
    return tokens, smallest


@helper
def sum_ranks(tokens: np.ndarray, P: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads of experts [E], and of ranks under plain expert parallelism [P], from [any, E]."""
    E = tokens.shape[1]
    loads, load = zeros(E), zeros(P)
    for row in tokens:
        for expert in range(E):
            loads[expert] += row[expert]
    for rank in range(P):
        for expert in range(rank * E // P, (rank + 1) * E // P):
            load[rank] += loads[expert]
    return loads, load


@helper
def give_tables(
    loads: np.ndarray, P: int, moves: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tables of a plan, from its moves.

    Args:
        loads: int64 [E] tokens per expert.
        P: ranks.
        moves: int64 [any, 3], at most one for an expert and a borrower.
        n: how many there are.

    Returns:
        quota [E, P], foreign_experts [P, S] and transfers [n, 3] as in `Plan`.
    """
    E = len(loads)
    M = E // P
    quota = zero_table(E, P)
    for expert in range(E):
        quota[expert, expert // M] = loads[expert]
    for i in range(n):
        expert, borrower, tokens = moves[i, 0], moves[i, 1], moves[i, 2]
        quota[expert, expert // M] -= tokens
        quota[expert, borrower] += tokens
    foreign_experts, transfers = give_slots(E, P, moves, n)
    return quota, foreign_experts, transfers


@helper
def give_slots(E: int, P: int, moves: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """foreign_experts [P, S] and transfers [n, 3] of a plan, from its n moves."""
    M = E // P
    num_foreign = zeros(P)
    start = zeros(P + 1)  # of each home's transfers
    for i in range(n):
        start[moves[i, 0] // M + 1] += 1
        num_foreign[moves[i, 1]] += 1
    for home in range(P):
        start[home + 1] += start[home]
    S = largest_of(num_foreign)
    held = zero_table(P, S + 1)  # a queue for each rank
    for i in range(n):
        insert(held[moves[i, 1]], moves[i, 0])
    foreign_experts, transfers = zero_table(P, S), new_moves(n)
    for borrower in range(P):
        for i in range(S):
            if i < num_foreign[borrower]:
                expert = held[borrower, i + 1]
                home = expert // M
                foreign_experts[borrower, i] = expert
                transfers[start[home], 0] = expert
                transfers[start[home], 1] = home
                transfers[start[home], 2] = borrower
                start[home] += 1
            else:
                foreign_experts[borrower, i] = -1
    return foreign_experts, transfers


@entry
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
    before, after = zeros(P), zeros(P)
    n = 0
    for expert in range(E):
        for rank in range(P):
            tokens = quota[expert, rank]
            before[expert // M] += tokens
            after[rank] += tokens
            n += tokens != 0 and rank != expert // M
    moves = new_moves(n)
    n = 0 * P  # no literal, for which numba would compile `set_move` a second time
    for expert in range(E):
        for rank in range(P):
            if quota[expert, rank] and rank != expert // M:
                set_move(moves, n, expert, rank, quota[expert, rank])
                n += 1
    foreign_experts, transfers = give_slots(E, P, moves, n)
    return foreign_experts, transfers, total_of(before), largest_of(before), largest_of(after)
