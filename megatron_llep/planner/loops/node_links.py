"""What crosses the links of nodes, in pairs: tokens, weights and gradients of lent experts.

Shape letters: N nodes, E experts, t nodes that borrow an expert. Loads of links are int64 [2, N]:
what a node sends, then what it receives, in both passes. `planner.prices` says how loans are
measured in pairs, `lending.fan_out` which way an expert goes.
"""

import numpy as np

from megatron_llep.planner.loops.jit import helper


@helper
def crossing(tokens: int, quota: int) -> int:
    """Pairs of an expert that cross a node's link: it has so many, and computes so many."""
    return tokens + quota - 2 * min(tokens, quota)


@helper
def busiest_way(links: np.ndarray, node: int) -> int:
    """The larger of what a node sends and receives."""
    return max(links[0, node], links[1, node])


@helper
def busiest_node(links: np.ndarray) -> int:
    """The node with the busiest link; the lowest of equals."""
    busiest = 0
    for node in range(links.shape[1]):
        if busiest_way(links, node) > busiest_way(links, busiest):
            busiest = node
    return busiest


@helper
def add_pairs(links: np.ndarray, node: int, pairs: int) -> None:
    """So many more pairs cross, each way."""
    links[0, node] += pairs
    links[1, node] += pairs


@helper
def loan_loads(t: int, prices: np.ndarray) -> tuple[int, int, int, int]:
    """What an expert that t other nodes borrow takes of links.

    Args:
        t: nodes.
        prices: [3], of weights, of gradients; and from how many nodes on it goes in shards.

    Returns:
        What the home's node sends, and receives; what each of the t sends, and receives.
    """
    weights, gradients, scatter_from = prices
    if t == 0:
        return 0, 0, 0, 0
    if not 0 < scatter_from <= t:
        return t * weights, t * gradients, gradients, weights
    # Nodes send each other all but their own shards.
    sends = gradients + weights * (t - 1) // t
    return weights, gradients, sends, weights + gradients * (t - 1) // t


@helper
def add_loan(
    links: np.ndarray, quota: np.ndarray, expert: int, home: int, prices: np.ndarray, sign: int
) -> None:
    """Add what lending one expert takes of all links, or take it off.

    Args:
        links: [2, N].
        quota: [N, E] pairs of each expert that each node computes.
        expert: that is lent.
        home: its node.
        prices: as for `loan_loads`.
        sign: 1 or -1.
    """
    t = 0
    for node in range(len(quota)):
        t += node != home and quota[node, expert] > 0
    home_sends, home_receives, sends, receives = loan_loads(t, prices)
    links[0, home] += sign * home_sends
    links[1, home] += sign * home_receives
    for node in range(len(quota)):
        if node != home and quota[node, expert] > 0:
            links[0, node] += sign * sends
            links[1, node] += sign * receives
