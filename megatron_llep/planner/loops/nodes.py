"""Balance and little traffic between nodes, from who sends what.

Shape letters: P ranks on N nodes of G, E experts, M = E / P experts native to a rank.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zero_table, zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.node_quotas import spread_over_nodes
from megatron_llep.planner.loops.node_ranks import even_out_ranks, spread_in_node


@helper
def node_quotas(
    counts: np.ndarray,
    max_foreign: int,
    node_size: int,
    most: int,
    prices: np.ndarray,
    quarters: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Quotas that leave no rank more than `most` pairs, as far as slots allow, with links spared.

    Nodes first (`spread_over_nodes`), then the ranks of each, then what is still above of all
    ranks. Some of a node's slots are kept for what its ranks hand on to each other.

    Args:
        counts: int64 [P, E] tokens of each rank for each expert.
        max_foreign: most foreign experts per rank, 0 .. M.
        node_size: G.
        most: pairs of a rank.
        prices: as for `loan_loads`.
        quarters: of a node's slots that are kept, 0 .. 4.

    Returns:
        quota int64 [E, P], and the pairs of each rank [P].
    """
    P, E = counts.shape
    N, M = P // node_size, E // P
    tokens = zero_table(N, E)
    for rank in range(P):
        for expert in range(E):
            tokens[rank // node_size, expert] += counts[rank, expert]
    most_experts = node_size * max_foreign
    most_experts -= most_experts * quarters // 4
    of_nodes = spread_over_nodes(tokens, most * node_size, most_experts, prices)
    quota, load, slots = zero_table(E, P), zeros(P), zeros(P)
    for expert in range(E):
        home = expert // M
        quota[expert, home] = of_nodes[home // node_size, expert]
        load[home] += quota[expert, home]
    for rank in range(P):
        slots[rank] = max_foreign
    for node in range(N):
        first = node * node_size
        spread_in_node(of_nodes[node], first, first + node_size, quota, load, slots)
        even_out_ranks(first, first + node_size, most, quota, load, slots)
    even_out_ranks(0, P, most, quota, load, slots)
    return quota, load
