"""Balance up to a tolerance, with as few transfers as possible.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import largest_of, total_of, zero_table, zeros
from megatron_llep.planner.loops.exact import even_shares, exact_moves, most_left
from megatron_llep.planner.loops.jit import entry, helper
from megatron_llep.planner.loops.moves import new_moves, set_move
from megatron_llep.planner.loops.queue import find, insert, take


@helper
def tolerant_moves(
    loads: np.ndarray,
    load: np.ndarray,
    max_foreign: int,
    group_size: int,
    tolerance: float,
    moves: np.ndarray,
) -> int:
    """Few moves after which no rank computes more than (1 + tolerance) * mean tokens.

    1. Every rank above the cap (`most_tokens`) lends its surplus (`_shed`).
    2. Lender and borrowers even out at no further transfer (`_even_out`).
    3. Where `exact_moves` keeps the cap with fewer moves, or has a lower largest load above it,
       its moves are taken. With a slot for each native expert it makes a move for every rank
       below its even share at least, so it is not tried where there are no more moves than these.

    So the cap is kept wherever `exact_moves` with the same slots and topology keeps it, and then
    there are no more moves than its. A surplus within the cap is not lent; one above it is,
    however small: the cap comes before min_tokens_per_gemm.

    Args:
        loads: int64 [E] tokens per expert.
        load: int64 [P] tokens per rank under plain expert parallelism; becomes those after.
        max_foreign: most foreign experts per rank, 0 .. M.
        group_size: ranks that lend to each other; divides P.
        tolerance: at least 0.
        moves: int64 [P * max_foreign, 3], filled with rows (expert, borrower, tokens).

    Returns:
        How many moves there are.
    """
    cap = most_tokens(load, group_size, tolerance)
    if largest_of(load) <= cap:
        return 0
    P = len(load)
    shares = even_shares(load, group_size)
    below_share = 0
    for rank in range(P):
        below_share += load[rank] < shares[rank]
    left, exact_load = loads.copy(), load.copy()
    n = _shed(left, load, max_foreign, group_size, cap, moves)
    n = _even_out(left, load, largest_of(shares), moves, n)
    if max_foreign == len(loads) // P and n <= below_share and largest_of(load) <= cap:
        return n
    exact = new_moves(len(moves))
    num_exact = exact_moves(loads, exact_load, max_foreign, group_size, exact)
    most, exact_most = max(cap, largest_of(load)), max(cap, largest_of(exact_load))
    if exact_most < most or (exact_most == most and num_exact < n):
        n = num_exact
        for i in range(n):
            set_move(moves, i, exact[i, 0], exact[i, 1], exact[i, 2])
        for rank in range(P):
            load[rank] = exact_load[rank]
    return n


@entry
def most_tokens(load: np.ndarray, group_size: int, tolerance: float) -> int:
    """The cap: (1 + tolerance) * mean, rounded down, but at least the mean, rounded up.

    Where a group of ranks that lend to each other has more than these can take under that cap, the
    mean is that of the group with the most tokens.
    """
    P = len(load)
    cap = _exceed_mean(total_of(load), P, tolerance)
    most = 0 * P
    for first in range(0, P, group_size):
        tokens = 0
        for rank in range(first, first + group_size):
            tokens += load[rank]
        most = max(most, tokens)
    return cap if most <= cap * group_size else _exceed_mean(most, group_size, tolerance)


@helper
def _exceed_mean(total: int, num_ranks: int, tolerance: float) -> int:
    """Most tokens with which a rank has at most 1 + tolerance times the mean; or the mean."""
    limit = min(1 + tolerance, float(num_ranks))
    tokens = int(limit * total / num_ranks) + 1
    while tokens * num_ranks / max(total, 1) > limit:
        tokens -= 1
    return max(tokens, (total + num_ranks - 1) // num_ranks)


@helper
def _shed(
    left: np.ndarray,
    load: np.ndarray,
    max_foreign: int,
    group_size: int,
    cap: int,
    moves: np.ndarray,
) -> int:
    """Moves that bring every rank down to the cap, as far as slots allow.

    The lender furthest above the cap goes first. It always lends from its expert with most
    tokens left, to the rank with the least room for all that expert or that surplus, or, if there
    is none, to the rank with most room, which it fills. The lowest id wins ties.

    A borrower's last slot must not leave room unused: it is filled up, even if the lender, which
    still has its slots, falls below the cap and so becomes a borrower.

    Updates `left`, the tokens of each expert at its home [E], and `load` [P].
    """
    P = len(load)
    M = len(left) // P
    if max_foreign == 0:
        return 0
    lenders = zeros(P + 1)
    # By group, a queue of the ranks with room and a slot, from the least room up.
    rooms = zero_table(P // group_size, group_size + 1)
    slots = zeros(P)
    for rank in range(P):
        slots[rank] = max_foreign
        if load[rank] > cap:
            insert(lenders, (load[rank] - cap) * P + P - 1 - rank)
        elif load[rank] < cap:
            insert(rooms[rank // group_size], (cap - load[rank]) * P + rank)
    n = 0 * P  # no literal, for which numba would compile `set_move` a second time
    while lenders[0]:
        lender = P - 1 - take(lenders, lenders[0]) % P
        queue = rooms[lender // group_size]
        while load[lender] > cap and queue[0]:
            expert = most_left(left, lender * M, M)
            wanted = min(left[expert], load[lender] - cap)
            most_room = queue[queue[0]] // P
            key = take(queue, find(queue, min(wanted, most_room) * P))
            room, borrower = key // P, key % P
            slots[borrower] -= 1
            tokens = min(wanted if slots[borrower] else left[expert], room)
            set_move(moves, n, expert, borrower, tokens)
            n += 1
            left[expert] -= tokens
            load[lender] -= tokens
            load[borrower] += tokens
            if slots[borrower] and room > tokens:
                insert(queue, (room - tokens) * P + borrower)
        if load[lender] < cap:
            insert(queue, (cap - load[lender]) * P + lender)
    return n


@helper
def _even_out(left: np.ndarray, load: np.ndarray, least: int, moves: np.ndarray, n: int) -> int:
    """Change how many tokens are lent so that each lender and its borrowers have equal loads.

    No lower than `least`, the best that the most loaded rank can have, as that would move tokens
    for nothing; and only if the largest load comes at least half the way down to it. No rank
    rises above the largest load before. A move of which nothing remains is dropped.

    Updates `left` [E], `load` [P] and the n moves, which are in the order of their lenders;
    returns how many there are then.
    """
    P = len(load)
    M = len(left) // P
    worth_it = (least + largest_of(load)) // 2
    level = zeros(P)  # of each lender and its borrowers
    first = 0 * n  # no literal, for which numba would compile the functions below a second time
    while first < n:
        lender, last = moves[first, 0] // M, _end_of_group(moves, n, first, M)
        total, members = load[lender], 1
        for i in range(first, last):
            borrower, is_new = moves[i, 1], True
            for k in range(first, i):
                is_new &= moves[k, 1] != borrower
            if is_new:
                total += load[borrower]
                members += 1
        level[lender] = max(least, (total + members - 1) // members)
        if level[lender] > worth_it:
            return n
        first = last
    first = 0 * n
    while first < n:
        lender, last = moves[first, 0] // M, _end_of_group(moves, n, first, M)
        _settle_at(level[lender], lender, moves, first, last, left, load)
        first = last
    kept = 0 * n
    for i in range(n):
        if moves[i, 2]:
            set_move(moves, kept, moves[i, 0], moves[i, 1], moves[i, 2])
            kept += 1
    return kept


@helper
def _end_of_group(moves: np.ndarray, n: int, first: int, M: int) -> int:
    """The place after the last move of the lender whose moves begin at `first`."""
    last = first
    while last < n and moves[last, 0] // M == moves[first, 0] // M:
        last += 1
    return last


@helper
def _settle_at(
    level: int,
    lender: int,
    moves: np.ndarray,
    first: int,
    last: int,
    left: np.ndarray,
    load: np.ndarray,
) -> None:
    """Bring a lender and its borrowers to one level: more is lent to those below, or less.

    Its moves are those from `first` to before `last`.
    """
    spare = load[lender] - level  # and what borrowers above the level will give back
    for i in range(first, last):
        spare += min(moves[i, 2], max(load[moves[i, 1]] - level, 0))
    for i in range(first, last):
        expert, borrower = moves[i, 0], moves[i, 1]
        tokens = min(spare, min(level - load[borrower], left[expert]))
        if tokens > 0:
            moves[i, 2] += tokens
            left[expert] -= tokens
            load[borrower] += tokens
            load[lender] -= tokens
            spare -= tokens
    for i in range(first, last):
        expert, borrower = moves[i, 0], moves[i, 1]
        tokens = min(moves[i, 2], min(load[borrower] - level, level - load[lender]))
        if tokens > 0:
            moves[i, 2] -= tokens
            left[expert] += tokens
            load[borrower] -= tokens
            load[lender] += tokens
