"""Least-Loaded Assignment, the planner of the LLEP paper (arXiv 2601.17111, Algorithms 2 and 3).

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import math
from heapq import heappop, heapreplace

import numpy as np

from megatron_llep.planner.plan import PlanMove
from megatron_llep.planner.topology import ONE_NODE, Topology


def lla_moves(
    loads: np.ndarray,
    rank_loads: list[int],
    max_foreign: int,
    topology: Topology = ONE_NODE,
    *,
    capacity_factor: float,
    min_tokens_per_gemm: int,
) -> list[PlanMove]:
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
        rank_loads: [P] tokens per rank under plain expert parallelism.
        max_foreign: most foreign experts per rank, 0 .. M.
        topology: `ranks_per_node` divides P.
        capacity_factor: alpha, at least 1.
        min_tokens_per_gemm: m, the fewest tokens worth a GEMM of their own.
    """
    P = len(rank_loads)
    M = len(loads) // P
    # Rounded first, so that 1.1 * 10 is 11 and not a token more.
    capacity = math.ceil(round(capacity_factor * sum(rank_loads) / P, 6))
    overloaded = sum(tokens > capacity for tokens in rank_loads)
    if not (overloaded and max_foreign):
        return []
    load = rank_loads.copy()
    slots = [max_foreign] * P
    size = topology.node_size(P)
    # By node, a heap of the (load, rank) with a slot. That of a rank which spilled is out of
    # date, and too high, but it has no room anyway.
    nodes = (
        [sorted(zip(load, range(P), strict=True))]
        if size == P
        else [
            sorted((load[rank], rank) for rank in range(first, first + size))
            for first in range(0, P, size)
        ]
    )
    moves: list[PlanMove] = []

    by_load = np.argsort(-loads, kind="stable")
    for expert, tokens in zip(by_load.tolist(), loads[by_load].tolist(), strict=True):
        if not overloaded:
            break
        home = expert // M
        mates = nodes[home // size]
        rest = min(tokens, load[home] - capacity)
        while rest > 0:
            smallest = min(rest, max(min_tokens_per_gemm, 1))
            ranks = mates
            if topology.lend_across_nodes and not (mates and capacity - mates[0][0] >= smallest):
                ranks = min(filter(None, nodes), default=mates)
            # With tokens to spill the home itself is above the capacity, so it ends here too.
            if not ranks or ranks[0][0] >= capacity:
                break
            least, borrower = ranks[0]
            room = capacity - least
            chunk = min(rest, room) if room >= smallest else rest
            moves.append((expert, borrower, chunk))
            load[borrower] += chunk
            slots[borrower] -= 1
            if slots[borrower]:
                heapreplace(ranks, (load[borrower], borrower))
            else:
                heappop(ranks)
            overloaded += chunk > room
            rest -= chunk
            load[home] -= chunk
            overloaded -= load[home] == capacity
    return moves
