"""How many pairs of each expert each node computes.

Shape letters: N nodes of G ranks, E experts.
"""

from typing import NamedTuple

import numpy as np

from megatron_llep.planner.loops.arrays import zero_table, zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.node_links import (
    BORROWS,
    LENDS,
    RECEIVES,
    SENDS,
    lent,
    passed_on,
)
from megatron_llep.planner.loops.queue import insert, take


class Nodes(NamedTuple):
    """Who computes what, and what follows from it. int64."""

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
    prices: np.ndarray
    """[3], of weights, of gradients; and from how many nodes on an expert goes in shards."""


@helper
def keep_at_home(tokens: np.ndarray, prices: np.ndarray) -> Nodes:
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
    return Nodes(tokens, quota, load, zeros(N), zeros(E), links, prices)


@helper
def shift(nodes: Nodes, expert: int, source: int, target: int, pairs: int) -> None:
    """Let one node compute so many pairs of an expert instead of another; loans are not priced."""
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
    quota[source, expert] -= pairs
    quota[target, expert] += pairs
    nodes.load[source] -= pairs
    nodes.load[target] += pairs
    nodes.held[target] += starts
    nodes.held[source] -= ends
    nodes.borrowers[expert] += starts
    nodes.borrowers[expert] -= ends


@helper
def price_loan(nodes: Nodes, expert: int, sign: int) -> None:
    """Add what lending an expert takes of all links (sign 1), or take it off (-1)."""
    t = nodes.borrowers[expert]
    if t == 0:
        return
    quota, links = nodes.quota, nodes.links
    N, E = quota.shape
    home = expert * N // E
    weights, gradients, scatter_from = nodes.prices
    price = weights + gradients
    links[LENDS, home] += sign * lent(t, price, scatter_from)
    shards = passed_on(t, price, scatter_from)
    for node in range(N):
        if node != home and quota[node, expert] > 0:
            links[BORROWS, node] += sign * price
            links[LENDS, node] += sign * shards


@helper
def keep_tokens(nodes: Nodes, most_experts: int, least: int) -> None:
    """Let nodes borrow the experts of which they have more than so many pairs, largest first."""
    tokens, quota, links = nodes.tokens, nodes.quota, nodes.links
    load, held, borrowers = nodes.load, nodes.held, nodes.borrowers
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
