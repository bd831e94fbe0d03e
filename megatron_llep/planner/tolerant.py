"""Balance up to a tolerance, with as few transfers as possible.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

from bisect import bisect_left, insort
from itertools import groupby

import numpy as np

from megatron_llep.planner.exact import even_shares, exact_moves, match_ranks
from megatron_llep.planner.plan import PlanMove, loads_after
from megatron_llep.planner.topology import ONE_NODE, Topology

Rooms = list[tuple[int, int]]
"""(tokens it can still take, rank) of the ranks of a node that have a slot, ascending."""


def tolerant_moves(
    loads: np.ndarray,
    rank_loads: list[int],
    max_foreign: int,
    topology: Topology = ONE_NODE,
    *,
    tolerance: float,
) -> list[PlanMove]:
    """Few moves after which no rank computes more than (1 + tolerance) * mean tokens.

    1. Every rank above the cap (`most_tokens`) lends its surplus (`_shed`).
    2. Lender and borrowers even out at no further transfer (`_even_out`).
    3. Where `exact_moves` keeps the cap with fewer moves, or has a lower largest load above it,
       its moves are taken. With a slot for each native expert it makes a move for each of its
       matches, and matches every rank below its even share, so it is not tried where there are
       no more moves than these.

    So the cap is kept wherever `exact_moves` with the same slots and topology keeps it, and then
    there are no more moves than its. A surplus within the cap is not lent; one above it is,
    however small: the cap comes before min_tokens_per_gemm.

    Args:
        loads: int64 [E] tokens per expert.
        rank_loads: [P] tokens per rank under plain expert parallelism.
        max_foreign: most foreign experts per rank, 0 .. M.
        topology: `ranks_per_node` divides P.
        tolerance: at least 0.
    """
    M = len(loads) // len(rank_loads)
    cap = most_tokens(rank_loads, topology, tolerance)
    if max(rank_loads) <= cap:
        return []
    moves = _shed(loads, rank_loads, max_foreign, topology, cap)
    shares = even_shares(rank_loads, topology)
    moves, after = _even_out(loads, rank_loads, moves, max(shares))
    below_share = sum(load < share for load, share in zip(rank_loads, shares, strict=True))
    # The second number is the sharper, and takes longer.
    no_more_than_exact = max_foreign == M and (
        len(moves) <= below_share or len(moves) <= len(match_ranks(rank_loads, topology))
    )
    if no_more_than_exact and max(after) <= cap:
        return moves
    exact = exact_moves(loads, rank_loads, max_foreign, topology)
    score = max(cap, *after), len(moves)
    exact_score = max(cap, *loads_after(rank_loads, exact, M)), len(exact)
    return exact if exact_score < score else moves


def most_tokens(rank_loads: list[int], topology: Topology, tolerance: float) -> int:
    """The cap: (1 + tolerance) * mean, rounded down, but at least the mean, rounded up.

    Where lending across nodes is ruled out and a node has more than its ranks can take under
    that cap, the mean is that of the node with the most tokens.
    """
    P = len(rank_loads)
    cap = _exceed_mean(sum(rank_loads), P, tolerance)
    if not topology.lend_across_nodes:
        size = topology.node_size(P)
        most = max(sum(rank_loads[first : first + size]) for first in range(0, P, size))
        if most > cap * size:
            return _exceed_mean(most, size, tolerance)
    return cap


def _exceed_mean(total: int, num_ranks: int, tolerance: float) -> int:
    """Most tokens with which a rank has at most 1 + tolerance times the mean; or the mean."""
    limit = min(1 + tolerance, num_ranks)
    tokens = int(limit * total / num_ranks) + 1
    while tokens * num_ranks / max(total, 1) > limit:
        tokens -= 1
    return max(tokens, -(-total // num_ranks))


def _shed(
    loads: np.ndarray, rank_loads: list[int], max_foreign: int, topology: Topology, cap: int
) -> list[PlanMove]:
    """Moves that bring every rank down to the cap, as far as slots allow.

    The lender furthest above the cap goes first. It always lends from its expert with most
    tokens left, to the rank with the least room for all that expert or that surplus, or, if there
    is none, to the rank with most room, which it fills. The lowest id wins ties.

    A borrower's last slot must not leave room unused: it is filled up, even if the lender, which
    still has its slots, falls below the cap and so becomes a borrower.

    A lender stays within its node if that has room for all its surplus, or as good a room;
    otherwise it looks at all nodes, if it may.
    """
    P = len(rank_loads)
    M = len(loads) // P
    size = topology.node_size(P)
    nodes: list[Rooms] = [
        sorted((cap - rank_loads[r], r) for r in range(first, first + size) if rank_loads[r] < cap)
        for first in range(0, P if max_foreign else 0, size)
    ]
    crosses = topology.lend_across_nodes and size < P
    slots = [max_foreign] * P
    moves: list[PlanMove] = []
    surpluses = sorted((cap - load, rank) for rank, load in enumerate(rank_loads) if load > cap)
    for negative_surplus, lender in surpluses if max_foreign else ():
        surplus = -negative_surplus
        first = lender * M
        left = loads[first : first + M].tolist()
        mates = nodes[lender // size]
        stays = not crosses or sum([room for room, _ in mates]) >= surplus
        while surplus > 0:
            most = max(left)
            wanted = min(most, surplus)
            rooms = mates if stays and (mates or not crosses) else _find_node(nodes, mates, wanted)
            if not rooms:
                break
            room, borrower = rooms.pop(bisect_left(rooms, (min(wanted, rooms[-1][0]),)))
            slots[borrower] -= 1
            tokens = min(wanted if slots[borrower] else most, room)
            expert = left.index(most)
            moves.append((first + expert, borrower, tokens))
            left[expert] -= tokens
            surplus -= tokens
            if slots[borrower] and room > tokens:
                insort(rooms, (room - tokens, borrower))
        if surplus < 0:
            insort(mates, (-surplus, lender))
    return moves


def _find_node(nodes: list[Rooms], mates: Rooms, wanted: int) -> Rooms:
    """The rooms with the best one for that many tokens; `mates` if one there is as large."""
    roomy = [rooms for rooms in nodes if rooms]
    if not roomy:
        return mates
    wanted = min(wanted, max(rooms[-1][0] for rooms in roomy))
    if mates and mates[-1][0] >= wanted:
        return mates
    enough = [rooms for rooms in roomy if rooms[-1][0] >= wanted]
    return min(enough, key=lambda rooms: rooms[bisect_left(rooms, (wanted,))])


def _even_out(
    loads: np.ndarray, rank_loads: list[int], moves: list[PlanMove], least: int
) -> tuple[list[PlanMove], list[int]]:
    """Change how many tokens are lent so that each lender and its borrowers have equal loads.

    No lower than `least`, the best that the most loaded rank can have, as that would move tokens
    for nothing; and only if the largest load comes at least half the way down to it. No rank
    rises above the largest load before. A move of which nothing remains is dropped.

    Returns the moves, and the loads of the ranks [P] with them.
    """
    M = len(loads) // len(rank_loads)
    load = loads_after(rank_loads, moves, M)
    worth_it = (least + max(load)) // 2
    groups = []
    for lender, group in groupby(moves, key=lambda move: move[0] // M):
        lent = list(group)
        members = {borrower for _, borrower, _ in lent}
        members.add(lender)
        level = max(least, -(-sum([load[rank] for rank in members]) // len(members)))
        if level > worth_it:
            return moves, load
        groups.append((lender, level, lent))
    for lender, level, lent in groups:
        _settle_at(level, lender, lent, load, loads)
    return [move for _, _, lent in groups for move in lent if move[2]], load


def _settle_at(
    level: int, lender: int, lent: list[PlanMove], load: list[int], loads: np.ndarray
) -> None:
    """Bring a lender and its borrowers to one level; changes `lent` and `load` in place."""
    left = {expert: int(loads[expert]) for expert, _, _ in lent}
    spare = load[lender] - level  # and what borrowers above the level will give back
    for expert, borrower, tokens in lent:
        left[expert] -= tokens
        spare += min(tokens, max(load[borrower] - level, 0))
    for i, (expert, borrower, tokens) in enumerate(lent):
        more = min(spare, level - load[borrower], left[expert])
        if more > 0:
            lent[i] = expert, borrower, tokens + more
            left[expert] -= more
            load[borrower] += more
            load[lender] -= more
            spare -= more
    for i, (expert, borrower, tokens) in enumerate(lent):
        back = min(tokens, load[borrower] - level, level - load[lender])
        if back > 0:
            lent[i] = expert, borrower, tokens - back
            load[borrower] -= back
            load[lender] += back
