"""Which part of which lent expert goes from which rank to which, in which exchange.

Shape letters: P ranks, M native experts a rank, n transfers, W numbers in an expert's weights, k
ranks of a team, t nodes. `lending.fan_out` says why experts travel in these ways.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zero_table, zeros
from megatron_llep.planner.loops.jit import entry, helper

ALIGNMENT = 64
"""Shards begin at a multiple of so many numbers, as GPUs copy and send aligned data faster."""

FIRST, ACROSS, INSIDE = 0, 1, 2
"""Of the exchanges: from the home; between nodes; between the ranks of a node."""


@entry
def list_pieces(
    transfers: np.ndarray, width: int, scatter_from: int, node_size: int, num_experts: int
) -> np.ndarray:
    """List all pieces of all experts that a plan lends.

    Args:
        transfers: int64 [n, 3] (expert, home, borrower), of a plan.
        width: W.
        scatter_from: borrowers, or nodes that borrow, from which on an expert goes in shards; 0:
            none does.
        node_size: ranks on a node; divides P.
        num_experts: E.

    Returns:
        int64 [pieces, 6]: exchange, source, target, expert, and the numbers of the expert from
        which and to before which it goes. No piece is empty.
    """
    E, n = num_experts, len(transfers)
    start = zeros(E + 1)  # of each expert's borrowers
    for i in range(n):
        start[transfers[i, 0] + 1] += 1
    for expert in range(E):
        start[expert + 1] += start[expert]
    borrowers, filled = zeros(n), zeros(E)
    home_of = zeros(E)
    for i in range(n):
        expert = transfers[i, 0]
        borrowers[start[expert] + filled[expert]] = transfers[i, 2]
        filled[expert] += 1
        home_of[expert] = transfers[i, 1]
    pieces = zero_table(0, 6)
    num_pieces = 0
    for _ in range(2):  # count them, then list them
        pieces = zero_table(num_pieces, 6)
        num_pieces = 0 * n
        for expert in range(E):
            first, last = start[expert], start[expert + 1]
            if first < last:
                num_pieces = _list_expert(
                    expert,
                    home_of[expert],
                    borrowers[first:last],
                    width,
                    scatter_from,
                    node_size,
                    pieces,
                    num_pieces,
                )
    return pieces


@helper
def _list_expert(
    expert: int,
    home: int,
    borrowers: np.ndarray,
    width: int,
    scatter_from: int,
    node_size: int,
    pieces: np.ndarray,
    n: int,
) -> int:
    """List the pieces of one expert, lent to the borrowers, ascending, behind the n of others."""
    k = len(borrowers)
    node, own = zeros(k), home // node_size
    team = zeros(k + 1)  # where the borrowers of each node begin, then k
    num_teams, far = 0, 0
    for i in range(k):
        node[i] = borrowers[i] // node_size
        if i == 0 or node[i] != node[i - 1]:
            team[num_teams] = i
            num_teams += 1
            far += node[i] != own
    team[num_teams] = k
    in_shards = scatter_from > 0 and far >= scatter_from
    begin, end = zeros(k), zeros(k)  # of what the home sends each borrower
    number = 0  # of the other nodes so far
    for t in range(num_teams):
        first, size = team[t], team[t + 1] - team[t]
        is_far = node[first] != own
        low, high = 0, width
        if is_far and in_shards:
            low, high = _cut(0, width, far, number), _cut(0, width, far, number + 1)
        number += is_far
        is_cut = size > 1 if is_far else scatter_from > 0 and size >= scatter_from
        for i in range(size):
            one = first + i
            begin[one], end[one] = low, high
            if is_cut:
                begin[one] = _cut(low, high, size, i)
                end[one] = _cut(low, high, size, i + 1)
            part = begin[one], end[one]
            n = _add(pieces, n, FIRST, home, borrowers[one], expert, part)
            for other in range(first, first + size):
                if is_cut and other != one:
                    n = _add(pieces, n, INSIDE, borrowers[one], borrowers[other], expert, part)
    for t in range(num_teams if in_shards else 0):
        first, size = team[t], team[t + 1] - team[t]
        for source in range(k):
            if node[first] == own or node[source] == own or node[first] == node[source]:
                continue
            for i in range(size):
                one = first + i
                low, high = begin[source], end[source]
                part = _cut(low, high, size, i), _cut(low, high, size, i + 1)
                n = _add(pieces, n, ACROSS, borrowers[source], borrowers[one], expert, part)
                for other in range(first, first + size):
                    if other != one:
                        n = _add(pieces, n, INSIDE, borrowers[one], borrowers[other], expert, part)
    return n


@helper
def _cut(low: int, high: int, parts: int, i: int) -> int:
    """Where part i of the numbers from `low` to `high` begins; the last parts may be empty."""
    step = (high - low + parts * ALIGNMENT - 1) // (parts * ALIGNMENT) * ALIGNMENT
    return min(low + i * step, high)


@helper
def _add(
    pieces: np.ndarray,
    n: int,
    exchange: int,
    source: int,
    target: int,
    expert: int,
    part: tuple[int, int],
) -> int:
    """Add a piece, if it is not empty, and if there is room; how many there are then."""
    low, high = part
    if low >= high:
        return n
    if n < len(pieces):
        pieces[n, 0] = exchange
        pieces[n, 1] = source
        pieces[n, 2] = target
        pieces[n, 3] = expert
        pieces[n, 4] = low
        pieces[n, 5] = high
    return n + 1
