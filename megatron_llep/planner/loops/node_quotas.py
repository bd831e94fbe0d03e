"""How many pairs of each expert each node computes.

Shape letters: N nodes, E experts.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.node_changes import find_link_change, find_load_change
from megatron_llep.planner.loops.node_links import (
    RECEIVES,
    SENDS,
    busiest_node,
    busy_with,
    waiting,
)
from megatron_llep.planner.loops.node_state import Nodes, keep_at_home, price_loan, shift
from megatron_llep.planner.loops.queue import insert, take

WORK = 3_000
"""Changes that are looked at, at most; each takes some 20 ns."""


@helper
def spread_over_nodes(
    tokens: np.ndarray, most_pairs: int, most_experts: int, prices: np.ndarray
) -> np.ndarray:
    """Quotas of nodes: none above its share, with as little waiting for exchanges as can be.

    1. A node borrows what it has so many pairs of that keeping them saves more than the loan takes
       (`keep_tokens`).
    2. One expert after another is moved between two nodes (`improve`).

    Where loans of the first step do not make a layer wait less, the second starts without them.

    Args:
        tokens: int64 [N, E] pairs of each node for each expert.
        most_pairs: a node is to compute.
        most_experts: a node may borrow.
        prices: [3], of weights, of gradients; and from how many nodes on an expert goes in shards.

    Returns:
        int64 [N, E]; a column sums to the expert's pairs.
    """
    weights, gradients, _ = prices
    nodes = keep_at_home(tokens, prices, most_pairs, most_experts)
    before = waiting(nodes.links, prices)
    # Half of the prices is what the crossings saved are worth; a little more found better plans.
    keep_tokens(nodes, (weights + gradients) * 11 // 20)
    improve(nodes, prices)
    after = waiting(nodes.links, prices)
    if after < before:
        return nodes.quota
    others = keep_at_home(tokens, prices, most_pairs, most_experts)
    improve(others, prices)
    return others.quota if waiting(others.links, prices) <= after else nodes.quota


@helper
def keep_tokens(nodes: Nodes, least: int) -> None:
    """Let nodes borrow the experts of which they have more than so many pairs, largest first."""
    tokens, quota, links = nodes.tokens, nodes.quota, nodes.links
    load, held, borrowers = nodes.load, nodes.held, nodes.borrowers
    most_experts = nodes.most_experts
    N, E = tokens.shape
    M = E // N
    queue = zeros(most_experts + 2)
    for node in range(N if most_experts else 0):
        queue[0] = 0
        for home in range(N):
            if home == node:
                continue
            for expert in range(home * M, (home + 1) * M):
                pairs = tokens[node, expert]
                if pairs <= least:
                    continue
                key = pairs * E + E - 1 - expert
                if queue[0] < most_experts:
                    insert(queue, key)
                elif key > queue[1]:
                    take(queue, 1)
                    insert(queue, key)
        for place in range(1, queue[0] + 1):
            expert, pairs = E - 1 - queue[place] % E, queue[place] // E
            home = expert // M
            quota[node, expert] = pairs
            quota[home, expert] -= pairs
            load[node] += pairs
            load[home] -= pairs
            links[SENDS, node] -= pairs
            links[RECEIVES, home] -= pairs
            borrowers[expert] += 1
        held[node] = queue[0]
    for expert in range(E):
        if borrowers[expert]:
            price_loan(nodes, expert, 1)


@helper
def improve(nodes: Nodes, prices: np.ndarray) -> None:
    """Change what nodes compute, one expert between two nodes at a time.

    While a node has more pairs than its ranks may have, it hands on what loads links least for
    each pair. Then the node with the busiest link makes the one change that leaves the largest
    of the links concerned least, as long as a layer waits less for its exchanges.
    """
    N = len(nodes.load)
    work = 0 * N
    while work < WORK:
        node = 0
        for other in range(N):
            if nodes.load[other] > nodes.load[node]:
                node = other
        over = nodes.load[node] - nodes.most_pairs
        busiest = busiest_node(nodes.links)
        most = busy_with(nodes.links, busiest)
        # Small experts change little: they are looked at if nothing else helps a load.
        if over > 0:
            found, looked = find_load_change(nodes, node, over, most, max(over // 4, 1))
            if found.expert < 0:
                work += looked
                found, looked = find_load_change(nodes, node, over, most, 1)
        else:
            found, looked = find_link_change(nodes, busiest, most, max(most // 128, 1))
        work += looked
        expert, source, target, pairs = found
        if expert < 0:
            return
        before = waiting(nodes.links, prices) if over <= 0 else 0
        shift(nodes, expert, source, target, pairs)
        if over <= 0 and waiting(nodes.links, prices) >= before:
            shift(nodes, expert, target, source, pairs)
            return
