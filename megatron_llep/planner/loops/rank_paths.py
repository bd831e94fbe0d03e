"""Surplus handed on from rank to rank, along the loans there are.

Shape letters: P ranks, E experts, M = E / P experts native to a rank, S foreign slots of a rank.
"""

from typing import NamedTuple

import numpy as np

from megatron_llep.planner.loops.arrays import zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.node_ranks import Ranks, add, take_off


class Search(NamedTuple):
    """How ranks were reached from a giver."""

    giver_of: np.ndarray
    """[P] from whom a rank takes an expert; -1: it is not reached."""
    expert_of: np.ndarray
    """[P] which one."""
    reached: np.ndarray
    """[P] ranks in the order in which they are reached."""
    looked_at: np.ndarray
    """[E] the number of the last search that looked at an expert's holders."""
    number: np.ndarray
    """[1] searches so far."""


@helper
def no_search(E: int, P: int) -> Search:
    """Room for searches."""
    return Search(zeros(P), zeros(P), zeros(P), zeros(E), zeros(1))


@helper
def push_along(
    ranks: Ranks, search: Search, first: int, last: int, most: int, spares_slots: bool
) -> None:
    """Bring ranks from `first` to `last` down to `most` pairs, by way of others.

    What a rank has too much of goes to one that holds the expert or has a slot, which hands on as
    many pairs of another expert, and so on to a rank with room: the shortest way.

    Args:
        ranks: updated.
        search: room for it.
        first: of the ranks.
        last: after the last of them.
        most: pairs of a rank.
        spares_slots: a slot is only used where there is no way without.
    """
    for giver in range(first, last):
        uses_slots = not spares_slots
        while ranks.load[giver] > most:
            end = _find_way(ranks, search, giver, first, last, most, uses_slots)
            if end >= 0:
                _push(ranks, search, giver, end, most)
            elif uses_slots:
                break
            uses_slots |= end < 0


@helper
def _find_way(
    ranks: Ranks,
    search: Search,
    giver: int,
    first: int,
    last: int,
    most: int,
    uses_slots: bool,
) -> int:
    """The nearest rank with room, -1 if there is none."""
    quota, load, foreign, held = ranks.quota, ranks.load, ranks.foreign, ranks.held
    giver_of, expert_of, reached = search.giver_of, search.expert_of, search.reached
    looked_at = search.looked_at
    borrowers, num_borrowers = ranks.borrowers, ranks.num_borrowers
    search.number[0] += 1
    number = search.number[0]
    E, P = quota.shape
    M, S = E // P, foreign.shape[1]
    for rank in range(first, last):
        giver_of[rank] = -1
    giver_of[giver] = giver
    reached[0] = giver
    num_reached, next_one = 1, 0
    while next_one < num_reached:
        rank = reached[next_one]
        next_one += 1
        for slot in range(M + held[rank]):
            expert = rank * M + slot if slot < M else foreign[rank, slot - M]
            if quota[expert, rank] == 0 or looked_at[expert] == number:
                continue
            looked_at[expert] = number
            holders = 1 + num_borrowers[expert]
            for i in range(holders + (last - first) * uses_slots):
                if i < holders:
                    other = borrowers[expert, i - 1] if i else expert // M
                    can_take = first <= other < last
                else:
                    other = first + i - holders
                    can_take = held[other] < S
                if not can_take or giver_of[other] >= 0:
                    continue
                giver_of[other], expert_of[other] = rank, expert
                if load[other] < most:
                    return other
                reached[num_reached] = other
                num_reached += 1
            uses_slots = False  # all ranks with a slot are reached
    return -1


@helper
def _push(ranks: Ranks, search: Search, giver: int, end: int, most: int) -> None:
    """Hand on as much as goes all the way."""
    giver_of, expert_of = search.giver_of, search.expert_of
    pairs = min(ranks.load[giver] - most, most - ranks.load[end])
    rank = end
    while rank != giver:
        pairs = min(pairs, ranks.quota[expert_of[rank], giver_of[rank]])
        rank = giver_of[rank]
    rank = end
    while rank != giver:
        add(ranks, rank, expert_of[rank], pairs)
        take_off(ranks, giver_of[rank], expert_of[rank], pairs)
        rank = giver_of[rank]
