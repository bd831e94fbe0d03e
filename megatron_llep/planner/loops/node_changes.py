"""Changes of what nodes compute: what each does to links, and which is the best.

Shape letters: N nodes, E experts.
"""

from typing import NamedTuple

import numpy as np

from megatron_llep.planner.loops.arrays import zeros
from megatron_llep.planner.loops.jit import helper, inner
from megatron_llep.planner.loops.node_links import (
    BORROWS,
    LENDS,
    RECEIVES,
    SENDS,
    busy,
    busy_with,
    lent,
    passed_on,
)
from megatron_llep.planner.loops.node_state import Nodes


class Change(NamedTuple):
    """Pairs of an expert that one node computes instead of another."""

    expert: int
    """-1: nothing changes."""
    source: int
    target: int
    pairs: int


@inner
def look_at(
    tokens: np.ndarray,
    quota: np.ndarray,
    links: np.ndarray,
    price: int,
    scatter_from: int,
    t: int,
    home: int,
    change: Change,
) -> tuple[int, int]:
    """Of the links concerned, the busiest after a change, and what it adds to all.

    Other borrowers' shards grow or shrink a little; that is left out.

    Args:
        tokens: of `Nodes`, taken out of it before the loop, and the next four.
        quota: see above.
        links: see above.
        price: see above.
        scatter_from: see above.
        t: nodes that borrow the expert.
        home: its node.
        change: of what they compute.
    """
    expert, source, target, pairs = change
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
    nodes: Nodes, node: int, over: int, busiest: int, least: int
) -> tuple[Change, int]:
    """The change that lowers a node's load at least cost for links, for each pair.

    Args:
        nodes: as they are.
        node: which has too many pairs.
        over: by how many.
        busiest: what the busiest link is busy with.
        least: pairs that it computes of experts which are looked at.

    Returns:
        The change, whose expert is -1 if there is none; and how many were looked at.
    """
    tokens, quota, links = nodes.tokens, nodes.quota, nodes.links
    load, held, borrowers = nodes.load, nodes.held, nodes.borrowers
    most_pairs, most_experts = nodes.most_pairs, nodes.most_experts
    price, scatter_from = nodes.price, nodes.scatter_from
    N, E = tokens.shape
    M = E // N
    takers, rooms, num_takers = zeros(N), zeros(N), 0 * N
    for other in range(N):
        if other != node and load[other] < most_pairs:
            takers[num_takers] = other
            rooms[num_takers] = min(most_pairs - load[other], over)
            num_takers += 1
    best, best_cost, looked = Change(-1, -1, -1, 1 + 0 * N), 0 * N, 0 * N
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
                change = Change(expert, node, other, pairs)
                most, more = look_at(
                    tokens, quota, links, price, scatter_from, borrowers[expert], home, change
                )
                cost = more + 4 * max(most - busiest, 0)
                if best.expert < 0 or cost * best.pairs < best_cost * pairs:
                    best, best_cost = change, cost
    return best, looked


@helper
def find_link_change(nodes: Nodes, node: int, busiest: int, least: int) -> tuple[Change, int]:
    """The change that leaves the largest of the links concerned least.

    Args:
        nodes: as they are.
        node: with the busiest link.
        busiest: what it is busy with.
        least: pairs that it computes, or has, of experts which are looked at.

    Returns:
        The change, whose expert is -1 if there is none; and how many were looked at.
    """
    tokens, quota, links = nodes.tokens, nodes.quota, nodes.links
    load, held, borrowers = nodes.load, nodes.held, nodes.borrowers
    most_pairs, most_experts = nodes.most_pairs, nodes.most_experts
    price, scatter_from = nodes.price, nodes.scatter_from
    N, E = tokens.shape
    M = E // N
    best, best_most, looked = Change(-1, -1, -1, 1 + 0 * N), busiest, 0 * N
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
                    change = Change(expert, node, other, pairs)
                    most, _ = look_at(
                        tokens, quota, links, price, scatter_from, borrowers[expert], home, change
                    )
                    if most < best_most:
                        best, best_most = change, most
            # Take from the home what it has.
            room, unmet = most_pairs - load[node], wants - has
            if node == home or room <= 0 or unmet <= 0:
                continue
            if has == 0 and held[node] >= most_experts:
                continue
            pairs = min(min(quota[home, expert], room), unmet)
            if pairs > 0:
                looked += 1
                change = Change(expert, home, node, pairs)
                most, _ = look_at(
                    tokens, quota, links, price, scatter_from, borrowers[expert], home, change
                )
                if most < best_most:
                    best, best_most = change, most
    return best, looked
