"""Which ranks of a node compute what the node computes.

Shape letters: P ranks, E experts, M = E / P experts native to a rank, S foreign slots of a rank.
"""

from typing import NamedTuple

import numpy as np

from megatron_llep.planner.loops.arrays import zero_table, zeros
from megatron_llep.planner.loops.jit import helper, inner
from megatron_llep.planner.loops.moves import new_moves, set_move
from megatron_llep.planner.loops.queue import insert


class Ranks(NamedTuple):
    """Who computes what. int64."""

    quota: np.ndarray
    """[E, P] pairs of each expert that each rank computes."""
    load: np.ndarray
    """[P] pairs of each rank."""
    foreign: np.ndarray
    """[P, S] experts that each rank borrows, as many as `held`."""
    held: np.ndarray
    """[P] how many these are."""
    borrowers: np.ndarray
    """[E, P] ranks that borrow each expert, as many as `num_borrowers`."""
    num_borrowers: np.ndarray
    """[E] how many these are."""


@helper
def natives_of(of_nodes: np.ndarray, P: int, max_foreign: int) -> Ranks:
    """What is computed at home, of quotas of nodes [N, E]."""
    N, E = of_nodes.shape
    M = E // P
    borrowers = np.empty((E, P), np.int64)
    foreign = zero_table(P, max_foreign)
    ranks = Ranks(zero_table(E, P), zeros(P), foreign, zeros(P), borrowers, zeros(E))
    for rank in range(P):
        for expert in range(rank * M, (rank + 1) * M):
            pairs = of_nodes[rank * N // P, expert]
            ranks.quota[expert, rank] = pairs
            ranks.load[rank] += pairs
    return ranks


@inner
def holds(ranks: Ranks, rank: int, expert: int) -> bool:
    """Whether a rank can compute an expert without a further slot."""
    E, P = ranks.quota.shape
    return rank == expert // (E // P) or ranks.quota[expert, rank] > 0


@inner
def add(ranks: Ranks, rank: int, expert: int, pairs: int) -> None:
    """Let a rank compute more of an expert; in a further slot, if it holds none."""
    if not holds(ranks, rank, expert):
        ranks.foreign[rank, ranks.held[rank]] = expert
        ranks.held[rank] += 1
        ranks.borrowers[expert, ranks.num_borrowers[expert]] = rank
        ranks.num_borrowers[expert] += 1
    ranks.quota[expert, rank] += pairs
    ranks.load[rank] += pairs


@inner
def take_off(ranks: Ranks, rank: int, expert: int, pairs: int) -> None:
    """Let a rank compute less of an expert; the slot is free if nothing remains."""
    ranks.quota[expert, rank] -= pairs
    ranks.load[rank] -= pairs
    if pairs == 0 or holds(ranks, rank, expert):
        return
    held = ranks.held[rank] - 1
    for slot in range(held):
        if ranks.foreign[rank, slot] == expert:
            ranks.foreign[rank, slot] = ranks.foreign[rank, held]
    ranks.held[rank] = held
    others = ranks.num_borrowers[expert] - 1
    for i in range(others):
        if ranks.borrowers[expert, i] == rank:
            ranks.borrowers[expert, i] = ranks.borrowers[expert, others]
    ranks.num_borrowers[expert] = others


@inner
def largest_expert(ranks: Ranks, rank: int) -> int:
    """The expert that a rank computes most of; of equals the lowest."""
    E, P = ranks.quota.shape
    M = E // P
    best = rank * M
    for expert in range(rank * M + 1, (rank + 1) * M):
        if ranks.quota[expert, rank] > ranks.quota[best, rank]:
            best = expert
    for slot in range(ranks.held[rank]):
        expert = ranks.foreign[rank, slot]
        more = ranks.quota[expert, rank] - ranks.quota[best, rank]
        if more > 0 or (more == 0 and expert < best):
            best = expert
    return best


@helper
def spread_in_node(of_node: np.ndarray, first: int, last: int, most: int, ranks: Ranks) -> None:
    """Give each expert that a node borrows to one of its ranks with a slot.

    The largest goes first, to the rank with most room for each of its free slots. Last slots are
    used when there are no others, and those of ranks with most room at the end: into these mates
    hand on. What finds no slot goes back to its home.

    Args:
        of_node: [E] pairs that the node computes.
        first: of its ranks.
        last: after the last of them.
        most: pairs that a rank is to have.
        ranks: updated.
    """
    quota, load, foreign, held = ranks.quota, ranks.load, ranks.foreign, ranks.held
    borrowers, num_borrowers = ranks.borrowers, ranks.num_borrowers
    E, P = quota.shape
    M, S = E // P, foreign.shape[1]
    queue = zeros(E + 1)
    for expert in range(E):
        if of_node[expert] and not first * M <= expert < last * M:
            insert(queue, of_node[expert] * E + E - 1 - expert)
    for place in range(queue[0], 0, -1):
        expert, pairs = E - 1 - queue[place] % E, queue[place] // E
        to, to_slots, to_room = -1, 0, 0
        for rank in range(first, last):
            slots, room = S - held[rank], most - load[rank]
            if slots == 0:
                continue
            if to < 0 or (slots > 1) > (to_slots > 1):
                is_better = True
            elif to_slots > 1:
                is_better = slots > 1 and room * to_slots > to_room * slots
            else:
                is_better = (room >= pairs, -room) > (to_room >= pairs, -to_room)
            if is_better:
                to, to_slots, to_room = rank, slots, room
        if to < 0:
            to = expert // M
        else:
            foreign[to, held[to]] = expert
            held[to] += 1
            borrowers[expert, num_borrowers[expert]] = to
            num_borrowers[expert] += 1
        quota[expert, to] += pairs
        load[to] += pairs


@helper
def even_out(ranks: Ranks, first: int, last: int, most: int) -> None:
    """Let ranks with more than `most` pairs hand some on, among those from `first` to `last`.

    The rank with most goes first, with the expert that it has most pairs of, to the rank with the
    least room for all of its surplus of it, or else to that with most room.
    """
    quota, load, held = ranks.quota, ranks.load, ranks.held
    E, P = quota.shape
    M, S = E // P, ranks.foreign.shape[1]
    is_stuck = zeros(P)
    while True:
        giver = -1
        for rank in range(first, last):
            if load[rank] > most and not is_stuck[rank] and (giver < 0 or load[rank] > load[giver]):
                giver = rank
        if giver < 0:
            return
        expert = largest_expert(ranks, giver)
        pairs = min(load[giver] - most, quota[expert, giver])
        to, to_room = -1, 0
        for rank in range(first, last):
            room = most - load[rank]
            if room <= 0 or not (held[rank] < S or quota[expert, rank] or rank == expert // M):
                continue
            if to < 0 or (min(room, pairs), -room) > (min(to_room, pairs), -to_room):
                to, to_room = rank, room
        if to < 0:
            is_stuck[giver] = 1
            continue
        pairs = min(pairs, to_room)
        add(ranks, to, expert, pairs)
        take_off(ranks, giver, expert, pairs)


@helper
def list_loans(ranks: Ranks) -> np.ndarray:
    """What is lent, as rows (expert, borrower, pairs)."""
    P, n = len(ranks.held), 0
    for rank in range(P):
        n += ranks.held[rank]
    moves = new_moves(n)
    n = 0 * P  # no literal, for which numba would compile `set_move` a second time
    for rank in range(P):
        for slot in range(ranks.held[rank]):
            expert = ranks.foreign[rank, slot]
            set_move(moves, n, expert, rank, ranks.quota[expert, rank])
            n += 1
    return moves
