"""What crosses the links of nodes, in pairs: tokens, and weights and gradients of lent experts.

Shape letters: N nodes, E experts, t nodes that borrow an expert. `planner.prices` says how loans
are measured in pairs, `lending.fan_out` which way an expert goes.

Links are int64 [4, N], of each node: the pairs that it sends in a dispatch, and receives; and the
experts, or shards of them, that it sends on their way out, and receives, in pairs at both prices
together. What a node sends in dispatch it receives in combine, and the other way round in backward.
So each of these four exchanges lasts as long as the larger of both. Weights cross beside one of
them and gradients beside another, one way each, so a loan takes both prices.
"""

import numpy as np

from megatron_llep.planner.loops.jit import helper, inner

SENDS, RECEIVES, LENDS, BORROWS = range(4)
"""Rows of links."""


@inner
def busy(sends: int, receives: int, lends: int, borrows: int) -> int:
    """What a link is busy with: two crossings of a pair take as long as one of its price."""
    return 2 * max(sends, receives) + max(lends, borrows)


@inner
def busy_with(links: np.ndarray, node: int) -> int:
    """What a node's link is busy with."""
    return busy(links[0, node], links[1, node], links[2, node], links[3, node])


@helper
def busiest_node(links: np.ndarray) -> int:
    """The node with the busiest link; the lowest of equals."""
    busiest = 0
    for node in range(links.shape[1]):
        if busy_with(links, node) > busy_with(links, busiest):
            busiest = node
    return busiest


@helper
def waiting(links: np.ndarray, prices: np.ndarray) -> int:
    """How long a layer waits for its exchanges, each as long as the busiest link in it."""
    weights, gradients, _ = prices
    both = max(weights + gradients, 1)
    tokens = beside_weights = beside_gradients = 0
    for node in range(links.shape[1]):
        pairs = max(links[SENDS, node], links[RECEIVES, node])
        loans = 2 * max(links[LENDS, node], links[BORROWS, node])
        tokens = max(tokens, pairs)
        beside_weights = max(beside_weights, pairs + -(-loans * weights // both))
        beside_gradients = max(beside_gradients, pairs + -(-loans * gradients // both))
    return 2 * tokens + beside_weights + beside_gradients


@helper
def lent(t: int, price: int, scatter_from: int) -> int:
    """What the home's node of an expert that t nodes borrow sends."""
    return price if 0 < scatter_from <= t else t * price


@helper
def passed_on(t: int, price: int, scatter_from: int) -> int:
    """What each of t nodes that borrow an expert sends to the others."""
    return -(-price * (t - 1) // t) if 0 < scatter_from <= t else 0
