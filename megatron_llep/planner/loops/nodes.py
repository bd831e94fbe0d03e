"""Balance and little traffic between nodes, from who sends what.

Shape letters: P ranks on N nodes of G, E experts, M = E / P experts native to a rank.
"""

import numpy as np

from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.node_quotas import spread_over_nodes
from megatron_llep.planner.loops.node_ranks import Ranks, even_out, natives_of, spread_in_node
from megatron_llep.planner.loops.rank_paths import no_search, push_along


@helper
def plan_ranks(
    tokens: np.ndarray,
    P: int,
    max_foreign: int,
    most: int,
    prices: np.ndarray,
    eighths: int,
) -> Ranks:
    """Plan so that no rank has more than `most` pairs, as far as slots allow, with links spared.

    Nodes first, then the ranks of each, then what is still above of all ranks. Some of a node's
    slots are kept for what its ranks hand on to each other.

    Args:
        tokens: int64 [N, E] pairs of each node for each expert.
        P: ranks.
        max_foreign: most foreign experts per rank, 0 .. M.
        most: pairs of a rank.
        prices: of loans, as for `spread_over_nodes`.
        eighths: of a node's slots that are kept, 0 .. 8.
    """
    N, E = tokens.shape
    G = P // N
    most_experts = G * max_foreign
    most_experts -= most_experts * eighths // 8
    of_nodes = spread_over_nodes(tokens, most * G, most_experts, prices)
    ranks, search = natives_of(of_nodes, P, max_foreign), no_search(E, P)
    for node in range(N):
        first = node * G
        spread_in_node(of_nodes[node], first, first + G, most, ranks)
        even_out(ranks, first, first + G, most)
        push_along(ranks, search, first, first + G, most, False)
    even_out(ranks, 0, P, most)
    push_along(ranks, search, 0, P, most, True)
    return ranks
