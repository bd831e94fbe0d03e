"""Least-Loaded Assignment, the planner of the LLEP paper (arXiv 2601.17111, Algorithms 2 and 3).

Shape letters: P ranks, E experts, M = E / P experts native to a rank, N nodes.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import largest_of, total_of, zero_table, zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.moves import set_move
from megatron_llep.planner.loops.queue import NO_KEY, insert, take


@helper
def lla_moves(
    loads: np.ndarray,
    load: np.ndarray,
    max_foreign: int,
    node_size: int,
    lends_across: bool,
    capacity_factor: float,
    min_tokens_per_gemm: int,
    moves: np.ndarray,
) -> int:
    """Moves of Algorithm 2 (LLA), which spills with Algorithm 3 (LLAS).

    The paper keeps two loads per rank: assigned (g_a) and pending (g_p, native experts not yet
    visited). Here `load` is their sum, the *effective load*. No rank should exceed the capacity
    m_alpha = alpha * total / P. Experts are visited from the most to the fewest tokens (lowest
    id first among equals). With g_p reduced by the expert's v tokens, its home has room for
    na = m_alpha - g_a - g_p = m_alpha - load + v of them:

    - na >= v: home takes all;
    - 0 < na < v: home takes na, v - na spill;
    - na <= 0: all v spill.

    In every case min(v, load - m_alpha) tokens spill, if that is positive.

    LLAS gives r spilled tokens away in rounds. It goes through the other ranks from the least
    effective load up (lowest id first) and gives the first one with room c = min(r, m_alpha -
    load) tokens, but skips a rank where c < m and c < r; if every rank is full or skipped, the
    least loaded takes all r, above the capacity. The room falls along that order, so a round
    always ends at the least-loaded rank, which takes c, or r where c < m. It is then full, so
    no rank takes two chunks of an expert.

    What differs from the paper:

    - m_alpha is rounded up to whole tokens (down, alpha = 1 could not hold all tokens).
    - Slot bound: a rank that holds `max_foreign` foreign experts is no candidate for a further
      one. If no candidate is left, or none with room, the rest of the expert's tokens stay at
      home. (Without the bound some candidate always has room.)
    - Nodes: a round goes through the ranks of the home's node before the others, and through
      these alone where lending across nodes is ruled out.

    Args:
        loads: int64 [E] tokens per expert.
        load: int64 [P] tokens per rank under plain expert parallelism; becomes those after.
        max_foreign: most foreign experts per rank, 0 .. M.
        node_size: ranks on a node; divides P.
        lends_across: whether experts may be lent to other nodes.
        capacity_factor: alpha, at least 1.
        min_tokens_per_gemm: m, the fewest tokens worth a GEMM of their own.
        moves: int64 [P * max_foreign, 3], filled with rows (expert, borrower, tokens).

    Returns:
        How many moves there are.
    """
    P, E = len(load), len(loads)
    M = E // P
    exact_capacity = capacity_factor * total_of(load) / P
    capacity = int(exact_capacity)
    # A millionth of a token is rounding: 1.1 * 10 is 11 and not a token more.
    capacity += exact_capacity - capacity > 5e-7
    if max_foreign == 0 or largest_of(load) <= capacity:
        return 0
    # By node, a queue of the ranks with room and a slot, from the least loaded up. A rank that
    # has spilled has no room.
    queues = zero_table(P // node_size, node_size + 1)
    slots = zeros(P)
    for rank in range(P):
        slots[rank] = max_foreign
        if load[rank] < capacity:
            insert(queues[rank // node_size], load[rank] * P + rank)
    n = 0 * P  # no literal, for which numba would compile `set_move` a second time
    # The experts of ranks above the capacity, as only these spill. Of turned ids, so that the last
    # one is the lowest id among those with most.
    experts = zeros(E + 1)
    for rank in range(P):
        if load[rank] > capacity:
            _line_up(loads, rank * M, M, NO_KEY, experts)
    while experts[0]:
        key = take(experts, experts[0])
        expert = E - 1 - key % E
        home = expert // M
        rest = min(loads[expert], load[home] - capacity)
        while rest > 0:
            smallest = min(rest, max(min_tokens_per_gemm, 1))
            node = home // node_size
            if lends_across and not (
                queues[node, 0] and capacity - queues[node, 1] // P >= smallest
            ):
                node = _least_loaded(queues, node)
            if not queues[node, 0]:
                break
            borrower = take(queues[node], 1) % P
            room = capacity - load[borrower]
            chunk = min(rest, room) if room >= smallest else rest
            set_move(moves, n, expert, borrower, chunk)
            n += 1
            rest -= chunk
            load[home] -= chunk
            load[borrower] += chunk
            slots[borrower] -= 1
            if load[borrower] > capacity:
                _line_up(loads, borrower * M, M, key, experts)
            if slots[borrower] and load[borrower] < capacity:
                insert(queues[node], load[borrower] * P + borrower)
    return n


@helper
def _least_loaded(queues: np.ndarray, default: int) -> int:
    """The node whose first rank is the least loaded; the default if no node has one."""
    best = default
    for node in range(len(queues)):
        if queues[node, 0] and (not queues[best, 0] or queues[node, 1] < queues[best, 1]):
            best = node
    return best


@helper
def _line_up(loads: np.ndarray, first: int, num: int, before: int, experts: np.ndarray) -> None:
    """Add so many experts from the first on to a queue, those with keys below `before`."""
    E = len(loads)
    for expert in range(first, first + num):
        key = loads[expert] * E + E - 1 - expert
        if key < before:
            insert(experts, key)
