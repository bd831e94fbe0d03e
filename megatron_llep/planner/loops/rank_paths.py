"""Surplus handed on from rank to rank, along the loans there are.

Shape letters: P ranks, E experts, M = E / P experts native to a rank, S foreign slots of a rank.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.node_ranks import Ranks, add, take_off


@helper
def push_along(ranks: Ranks, first: int, last: int, most: int) -> None:
    """Bring ranks from `first` to `last` down to `most` pairs, by way of others.

    What a rank has too much of goes to one that holds the expert or has a slot, which hands on as
    many pairs of another expert, and so on to a rank with room: the shortest way, without a slot if
    there is one.
    """
    P = len(ranks.load)
    giver_of, expert_of, reached = zeros(P), zeros(P), zeros(P)
    for giver in range(first, last):
        uses_slots = False
        while ranks.load[giver] > most:
            end = _find_way(
                ranks, giver, first, last, most, uses_slots, giver_of, expert_of, reached
            )
            if end >= 0:
                _push(ranks, giver, end, most, giver_of, expert_of)
            elif uses_slots:
                break
            uses_slots = end < 0


@helper
def _find_way(
    ranks: Ranks,
    giver: int,
    first: int,
    last: int,
    most: int,
    uses_slots: bool,
    giver_of: np.ndarray,
    expert_of: np.ndarray,
    reached: np.ndarray,
) -> int:
    """The nearest rank with room, -1 if there is none.

    Fills `giver_of` and `expert_of`: from whom a rank on the way takes which expert. `reached` is
    room for P ranks.
    """
    quota, load, foreign, held = ranks.quota, ranks.load, ranks.foreign, ranks.held
    E, P = quota.shape
    M, S = E // P, foreign.shape[1]
    for rank in range(first, last):
        giver_of[rank] = -1
    giver_of[giver] = giver
    reached[0] = giver
    num_reached, looked = 1, 0
    while looked < num_reached:
        rank = reached[looked]
        looked += 1
        for slot in range(M + held[rank]):
            expert = rank * M + slot if slot < M else foreign[rank, slot - M]
            if quota[expert, rank] == 0:
                continue
            home = expert // M
            for other in range(first, last):
                if giver_of[other] >= 0:
                    continue
                if not (quota[expert, other] or other == home or (uses_slots and held[other] < S)):
                    continue
                giver_of[other], expert_of[other] = rank, expert
                if load[other] < most:
                    return other
                reached[num_reached] = other
                num_reached += 1
    return -1


@helper
def _push(
    ranks: Ranks, giver: int, end: int, most: int, giver_of: np.ndarray, expert_of: np.ndarray
) -> None:
    """Hand on as much as goes all the way."""
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
