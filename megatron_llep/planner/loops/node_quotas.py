"""How many pairs of each expert each node computes.

Shape letters: N nodes of G ranks, E experts.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zero_table, zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.node_links import (
    add_loan,
    add_pairs,
    busiest_node,
    busiest_way,
    crossing,
    loan_loads,
)
from megatron_llep.planner.loops.queue import insert

WORK = 3_000
"""Changes that are looked at, at most; each takes some 20 ns."""


@helper
def spread_over_nodes(
    tokens: np.ndarray, most_pairs: int, most_experts: int, prices: np.ndarray
) -> np.ndarray:
    """Quotas of nodes: first no node above its share, then the busiest link as little as possible.

    1. A node borrows what it has so many pairs of that keeping them saves more than the loan takes,
       the largest first (`_keep_tokens`).
    2. While a node has more pairs than its ranks may have, it hands on what loads links least for
       each pair. Then the node with the busiest link makes the one change that leaves the largest
       of the links concerned least, as long as there is one that helps.

    Args:
        tokens: int64 [N, E] pairs of each node for each expert.
        most_pairs: a node is to compute.
        most_experts: a node may borrow.
        prices: as for `loan_loads`.

    Returns:
        int64 [N, E]; a column sums to the expert's pairs.
    """
    N, E = tokens.shape
    quota = zero_table(N, E)
    load, held = zeros(N), zeros(N)
    links = zero_table(2, N)
    for expert in range(E):
        home = expert * N // E
        for node in range(N):
            quota[home, expert] += tokens[node, expert]
        load[home] += quota[home, expert]
    _keep_tokens(tokens, most_experts, prices, quota, load, held)
    for expert in range(E):
        for node in range(N):
            add_pairs(links, node, crossing(tokens[node, expert], quota[node, expert]))
        add_loan(links, quota, expert, expert * N // E, prices, 1)
    _improve(tokens, most_pairs, most_experts, prices, quota, load, held, links)
    return quota


@helper
def _keep_tokens(
    tokens: np.ndarray,
    most_experts: int,
    prices: np.ndarray,
    quota: np.ndarray,
    load: np.ndarray,
    held: np.ndarray,
) -> None:
    """Let nodes borrow what pays by itself, whatever it does to loads.

    Of each of the nodes concerned a loan takes the larger of both prices or, in shards, their sum.
    """
    N, E = tokens.shape
    weights, gradients, scatter_from = prices
    whole, in_shards = max(weights, gradients), weights + gradients
    least = zeros(E)
    for expert in range(E):
        worth = 0
        for node in range(N):
            worth += node != expert * N // E and tokens[node, expert] > in_shards
        least[expert] = in_shards if 0 < scatter_from <= worth else whole
    queue = zeros(E + 1)
    for node in range(N):
        queue[0] = 0
        for expert in range(E):
            if expert * N // E != node and tokens[node, expert] > least[expert]:
                insert(queue, tokens[node, expert] * E + E - 1 - expert)
        while queue[0] and held[node] < most_experts:
            expert = E - 1 - queue[queue[0]] % E
            queue[0] -= 1
            kept = tokens[node, expert]
            home = expert * N // E
            quota[node, expert] += kept
            quota[home, expert] -= kept
            load[node] += kept
            load[home] -= kept
            held[node] += 1


@helper
def _improve(
    tokens: np.ndarray,
    most_pairs: int,
    most_experts: int,
    prices: np.ndarray,
    quota: np.ndarray,
    load: np.ndarray,
    held: np.ndarray,
    links: np.ndarray,
) -> None:
    """Change quotas, one expert between two nodes at a time; updates all tables."""
    N, E = tokens.shape
    work = zeros(1)
    while work[0] < WORK:
        node = 0
        for other in range(N):
            if load[other] > load[node]:
                node = other
        over = load[node] - most_pairs
        if over <= 0:
            node = busiest_node(links)
        busiest = busiest_way(links, busiest_node(links))
        # Small experts change little: they are looked at if nothing else helps a load.
        least = over // 8 if over > 0 else busiest // 64
        args = node, over, busiest
        found = _find_change(
            tokens, most_pairs, most_experts, prices, quota, load, held, links, *args, least, work
        )
        if found[0] < 0 and over > 0:
            found = _find_change(
                tokens, most_pairs, most_experts, prices, quota, load, held, links, *args, 1, work
            )
        expert, source, target, moved = found
        if expert < 0:
            return
        home = expert * N // E
        add_loan(links, quota, expert, home, prices, -1)
        for each, change in ((source, -moved), (target, moved)):
            has = quota[each, expert]
            add_pairs(links, each, -crossing(tokens[each, expert], has))
            add_pairs(links, each, crossing(tokens[each, expert], has + change))
            held[each] -= each != home and has > 0
            held[each] += each != home and has + change > 0
            quota[each, expert] += change
            load[each] += change
        add_loan(links, quota, expert, home, prices, 1)


@helper
def _find_change(
    tokens: np.ndarray,
    most_pairs: int,
    most_experts: int,
    prices: np.ndarray,
    quota: np.ndarray,
    load: np.ndarray,
    held: np.ndarray,
    links: np.ndarray,
    node: int,
    over: int,
    busiest: int,
    least: int,
    work: np.ndarray,
) -> tuple[int, int, int, int]:
    """The best change of what one node computes.

    Args:
        tokens: as for `spread_over_nodes`, and those up to `prices`.
        most_pairs: likewise.
        most_experts: likewise.
        prices: likewise.
        quota: [N, E], of nodes.
        load: [N] pairs.
        held: [N] experts that each borrows.
        links: [2, N].
        node: whose load or link is to fall.
        over: pairs that it has too many; 0 or less: its link is to fall.
        busiest: of all ways of all links.
        least: experts are looked at of which it has, or computes, so many.
        work: [1] changes looked at so far.

    Returns:
        The expert, from where to where it goes, and how many pairs; -1 first if nothing helps.
    """
    N, E = tokens.shape
    best, best_score = (-1, -1, -1, 0 * N), 0.0
    for expert in range(E):
        has = quota[node, expert]
        if has < least and (over > 0 or tokens[node, expert] < least):
            continue
        home = expert * N // E
        t = 0
        for other in range(N):
            t += other != home and quota[other, expert] > 0
        for other in range(N):
            if other == node:
                continue
            # Give to another node or, of what there is none here, take from the home.
            source, target = node, other
            if has == 0:
                if other != home or over > 0:
                    continue
                source, target = other, node
            starts = target != home and quota[target, expert] == 0
            if quota[source, expert] == 0 or (starts and held[target] >= most_experts):
                continue
            moved = min(quota[source, expert], most_pairs - load[target])
            if over > 0:
                moved = min(moved, over)
            elif tokens[target, expert] > quota[target, expert]:
                moved = min(moved, tokens[target, expert] - quota[target, expert])
            if moved <= 0:
                continue
            work[0] += 1
            ends = source != home and quota[source, expert] == moved
            most, more = 0, 0
            old, new = loan_loads(t, prices), loan_loads(t + starts - ends, prices)
            for each in range(N):
                was = each != home and quota[each, expert] > 0
                sends = receives = 0
                if each == home:
                    sends, receives = new[0] - old[0], new[1] - old[1]
                elif was or (starts and each == target):
                    will = not (ends and each == source)
                    sends = will * new[2] - was * old[2]
                    receives = will * new[3] - was * old[3]
                if each in (source, target):
                    change = moved if each == target else -moved
                    more_pairs = crossing(
                        tokens[each, expert], quota[each, expert] + change
                    ) - crossing(tokens[each, expert], quota[each, expert])
                    sends += more_pairs
                    receives += more_pairs
                elif not (starts or ends):
                    continue
                more += max(sends, receives)
                if sends or receives:
                    most = max(most, links[0, each] + sends, links[1, each] + receives)
            if over > 0:
                score = (more + 4 * max(most - busiest, 0)) / moved
            elif most < busiest:
                score = float(most)
            else:
                continue
            if best[0] < 0 or score < best_score:
                best, best_score = (expert, source, target, moved), score
    return best
