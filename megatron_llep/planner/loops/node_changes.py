"""Changes of what nodes compute, one expert between two nodes at a time.

Shape letters: N nodes, E experts.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.node_links import (
    BORROWS,
    LENDS,
    RECEIVES,
    SENDS,
    busiest_node,
    busy,
    busy_with,
    lent,
    passed_on,
    waiting,
)
from megatron_llep.planner.loops.node_quotas import Nodes, price_loan, shift

WORK = 3_000
"""Changes that are looked at, at most."""

Change = tuple[int, int, int, int]
"""Expert, from where to where it goes, and how many pairs."""


@helper
def change(nodes: Nodes, expert: int, source: int, target: int, pairs: int) -> None:
    """Make a change; updates all."""
    price_loan(nodes, expert, -1)
    shift(nodes, expert, source, target, pairs)
    price_loan(nodes, expert, 1)


@helper
def improve(nodes: Nodes, most_pairs: int, most_experts: int) -> None:
    """First no node above its share, then the busiest link as little as possible.

    While a node has more pairs than its ranks may have, it hands on what loads links least for
    each pair. Then the node with the busiest link makes the one change that leaves the largest
    of the links concerned least, as long as there is one that helps.
    """
    N = len(nodes.load)
    work = 0 * N
    while work < WORK:
        node = 0
        for other in range(N):
            if nodes.load[other] > nodes.load[node]:
                node = other
        over = nodes.load[node] - most_pairs
        busiest = busiest_node(nodes.links)
        most = busy_with(nodes.links, busiest)
        if over > 0:
            # Small experts change little: they are looked at if nothing else helps a load.
            found, looked = find_load_change(
                nodes, node, over, most, max(over // 8, 1), most_pairs, most_experts
            )
            work += looked
            if found[0] < 0:
                found, looked = find_load_change(
                    nodes, node, over, most, 1, most_pairs, most_experts
                )
                work += looked
            expert, source, target, pairs = found
            if expert < 0:
                return
            change(nodes, expert, source, target, pairs)
        else:
            found, looked = find_link_change(
                nodes, busiest, most, max(most // 128, 1), most_pairs, most_experts
            )
            work += looked
            expert, source, target, pairs = found
            if expert < 0:
                return
            before = waiting(nodes.links, nodes.prices)
            change(nodes, expert, source, target, pairs)
            if waiting(nodes.links, nodes.prices) >= before:
                change(nodes, expert, target, source, pairs)
                return


@helper
def look_at(
    tokens: np.ndarray,
    quota: np.ndarray,
    links: np.ndarray,
    t: int,
    price: int,
    scatter_from: int,
    expert: int,
    home: int,
    source: int,
    target: int,
    pairs: int,
) -> tuple[int, int]:
    """Of the links concerned, the busiest after a change, and what it adds to all.

    Other borrowers' shards grow or shrink a little; that is left out.
    """
    has, gets = quota[source, expert], quota[target, expert]
    foreign = min(pairs, max(has - tokens[source, expert], 0))
    own = min(pairs, max(tokens[target, expert] - gets, 0))
    starts = target != home and gets == 0
    ends = source != home and has == pairs
    home_lends = source_lends = target_lends = source_borrows = target_borrows = 0
    if starts or ends:
        will = t + starts - ends
        home_lends = lent(will, price, scatter_from) - lent(t, price, scatter_from)
        if ends:
            source_borrows, source_lends = -price, -passed_on(t, price, scatter_from)
        if starts:
            target_borrows, target_lends = price, passed_on(will, price, scatter_from)
        if source == home:
            source_lends += home_lends
        elif target == home:
            target_lends += home_lends
    new_source = busy(
        links[SENDS, source] + pairs - foreign,
        links[RECEIVES, source] - foreign,
        links[LENDS, source] + source_lends,
        links[BORROWS, source] + source_borrows,
    )
    new_target = busy(
        links[SENDS, target] - own,
        links[RECEIVES, target] + pairs - own,
        links[LENDS, target] + target_lends,
        links[BORROWS, target] + target_borrows,
    )
    most = max(new_source, new_target)
    more = new_source + new_target - busy_with(links, source) - busy_with(links, target)
    if home_lends and source != home and target != home:
        new_home = busy(
            links[SENDS, home],
            links[RECEIVES, home],
            links[LENDS, home] + home_lends,
            links[BORROWS, home],
        )
        most = max(most, new_home)
        more += new_home - busy_with(links, home)
    return most, more


@helper
def find_load_change(
    nodes: Nodes,
    node: int,
    over: int,
    busiest: int,
    least: int,
    most_pairs: int,
    most_experts: int,
) -> tuple[Change, int]:
    """The change that lowers a node's load at least cost for links, for each pair.

    Args:
        nodes: as they are.
        node: which has too many pairs.
        over: by how many.
        busiest: what the busiest link is busy with.
        least: pairs that it computes of experts which are looked at.
        most_pairs: of a node.
        most_experts: that a node may borrow.

    Returns:
        The change, whose expert is -1 if there is none; and how many were looked at.
    """
    tokens, quota, links, load, held = (
        nodes.tokens,
        nodes.quota,
        nodes.links,
        nodes.load,
        nodes.held,
    )
    borrowers = nodes.borrowers
    price, scatter_from = nodes.prices[0] + nodes.prices[1], nodes.prices[2]
    N, E = tokens.shape
    M = E // N
    takers, rooms, num_takers = zeros(N), zeros(N), 0 * N
    for other in range(N):
        if other != node and load[other] < most_pairs:
            takers[num_takers] = other
            rooms[num_takers] = min(most_pairs - load[other], over)
            num_takers += 1
    best, best_cost, looked = (-1, -1, -1, 1 + 0 * N), 0 * N, 0 * N
    for home in range(N if num_takers else 0):
        for expert in range(home * M, (home + 1) * M):
            has = quota[node, expert]
            if has < least:
                continue
            # Of those that would have to borrow it, the one that can keep most is looked at.
            newcomer, most_kept = -1, 0 * N
            for i in range(num_takers):
                other = takers[i]
                if other != home and quota[other, expert] == 0 and held[other] < most_experts:
                    pairs = min(has, rooms[i])
                    kept = pairs + min(pairs, tokens[other, expert])
                    if kept > most_kept:
                        newcomer, most_kept = other, kept
            for i in range(num_takers):
                other = takers[i]
                if other != home and quota[other, expert] == 0 and other != newcomer:
                    continue
                pairs = min(has, rooms[i])
                looked += 1
                most, more = look_at(
                    tokens,
                    quota,
                    links,
                    borrowers[expert],
                    price,
                    scatter_from,
                    expert,
                    home,
                    node,
                    other,
                    pairs,
                )
                cost = more + 4 * max(most - busiest, 0)
                if best[0] < 0 or cost * best[3] < best_cost * pairs:
                    best, best_cost = (expert, node, other, pairs), cost
    return best, looked


@helper
def find_link_change(
    nodes: Nodes, node: int, busiest: int, least: int, most_pairs: int, most_experts: int
) -> tuple[Change, int]:
    """The change that leaves the largest of the links concerned least.

    Args:
        nodes: as they are.
        node: with the busiest link.
        busiest: what it is busy with.
        least: pairs that it computes, or has, of experts which are looked at.
        most_pairs: of a node.
        most_experts: that a node may borrow.

    Returns:
        The change, whose expert is -1 if there is none; and how many were looked at.
    """
    tokens, quota, links, load, held = (
        nodes.tokens,
        nodes.quota,
        nodes.links,
        nodes.load,
        nodes.held,
    )
    borrowers = nodes.borrowers
    price, scatter_from = nodes.prices[0] + nodes.prices[1], nodes.prices[2]
    N, E = tokens.shape
    M = E // N
    best, best_most, looked = (-1, -1, -1, 1 + 0 * N), busiest, 0 * N
    for home in range(N):
        for expert in range(home * M, (home + 1) * M):
            has, wants = quota[node, expert], tokens[node, expert]
            if has < least and wants < least:
                continue
            if has:
                # Give to another node what it has, or end a loan.
                for other in range(N):
                    unmet = tokens[other, expert] - quota[other, expert]
                    room = most_pairs - load[other]
                    if other == node or room <= 0 or unmet <= 0:
                        continue
                    if other != home and quota[other, expert] == 0 and held[other] >= most_experts:
                        continue
                    pairs = min(min(has, room), unmet)
                    looked += 1
                    most, _ = look_at(
                        tokens,
                        quota,
                        links,
                        borrowers[expert],
                        price,
                        scatter_from,
                        expert,
                        home,
                        node,
                        other,
                        pairs,
                    )
                    if most < best_most:
                        best, best_most = (expert, node, other, pairs), most
            # Take from the home what it has.
            room, unmet = most_pairs - load[node], wants - has
            if node == home or room <= 0 or unmet <= 0:
                continue
            if has == 0 and held[node] >= most_experts:
                continue
            pairs = min(min(quota[home, expert], room), unmet)
            if pairs > 0:
                looked += 1
                most, _ = look_at(
                    tokens,
                    quota,
                    links,
                    borrowers[expert],
                    price,
                    scatter_from,
                    expert,
                    home,
                    home,
                    node,
                    pairs,
                )
                if most < best_most:
                    best, best_most = (expert, home, node, pairs), most
    return best, looked
