"""What nodes compute, and what follows from it.

Shape letters: N nodes of G ranks, E experts.
"""

from typing import NamedTuple

import numpy as np

from megatron_llep.planner.loops.arrays import zero_table, zeros
from megatron_llep.planner.loops.jit import helper, inner
from megatron_llep.planner.loops.node_links import (
    BORROWS,
    LENDS,
    RECEIVES,
    SENDS,
    lent,
    passed_on,
)


class Nodes(NamedTuple):
    """Who computes what, and what follows from it. int64.

    Hot loops take the arrays into locals first: numba counts a reference at each use of a field.
    """

    tokens: np.ndarray
    """[N, E] pairs of each node for each expert."""
    quota: np.ndarray
    """[N, E] pairs that each node computes; a column sums to the expert's pairs."""
    load: np.ndarray
    """[N] pairs that each node computes."""
    held: np.ndarray
    """[N] experts that each node borrows."""
    borrowers: np.ndarray
    """[E] nodes that borrow each expert."""
    links: np.ndarray
    """[4, N] what crosses links, as in `node_links`."""
    price: int
    """Of weights and gradients."""
    scatter_from: int
    """Nodes from which on an expert goes in shards."""
    most_pairs: int
    """That a node is to compute."""
    most_experts: int
    """That a node may borrow."""


@helper
def keep_at_home(
    tokens: np.ndarray, prices: np.ndarray, most_pairs: int, most_experts: int
) -> Nodes:
    """Every expert computed on its own node."""
    N, E = tokens.shape
    quota, load, links = zero_table(N, E), zeros(N), zero_table(4, N)
    M = E // N
    for node in range(N):
        for home in range(N):
            pairs = 0 * N
            for expert in range(home * M, (home + 1) * M):
                quota[home, expert] += tokens[node, expert]
                pairs += tokens[node, expert]
            load[home] += pairs
            if home != node:
                links[SENDS, node] += pairs
                links[RECEIVES, home] += pairs
    held, borrowers = zeros(N), zeros(E)
    weights, gradients, scatter_from = prices
    price = weights + gradients
    return Nodes(
        tokens, quota, load, held, borrowers, links, price, scatter_from, most_pairs, most_experts
    )


@helper
def shift(nodes: Nodes, expert: int, source: int, target: int, pairs: int) -> None:
    """Let one node compute so many pairs of an expert instead of another; updates all."""
    N, E = nodes.tokens.shape
    home = expert * N // E
    tokens, quota, links = nodes.tokens, nodes.quota, nodes.links
    foreign = min(pairs, max(quota[source, expert] - tokens[source, expert], 0))
    links[RECEIVES, source] -= foreign
    links[SENDS, source] += pairs - foreign
    own = min(pairs, max(tokens[target, expert] - quota[target, expert], 0))
    links[SENDS, target] -= own
    links[RECEIVES, target] += pairs - own
    starts = target != home and quota[target, expert] == 0
    ends = source != home and quota[source, expert] == pairs
    if starts or ends:
        price_loan(nodes, expert, -1)
    quota[source, expert] -= pairs
    quota[target, expert] += pairs
    nodes.load[source] -= pairs
    nodes.load[target] += pairs
    nodes.held[target] += starts
    nodes.held[source] -= ends
    nodes.borrowers[expert] += starts
    nodes.borrowers[expert] -= ends
    if starts or ends:
        price_loan(nodes, expert, 1)


@inner
def price_loan(nodes: Nodes, expert: int, sign: int) -> None:
    """Add what lending an expert takes of all links (sign 1), or take it off (-1)."""
    t = nodes.borrowers[expert]
    if t == 0:
        return
    quota, links = nodes.quota, nodes.links
    N, E = quota.shape
    home = expert * N // E
    price, scatter_from = nodes.price, nodes.scatter_from
    links[LENDS, home] += sign * lent(t, price, scatter_from)
    shards = passed_on(t, price, scatter_from)
    for node in range(N):
        if node != home and quota[node, expert] > 0:
            links[BORROWS, node] += sign * price
            links[LENDS, node] += sign * shards
