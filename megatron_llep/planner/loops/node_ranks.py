"""Which ranks of a node compute what the node computes.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import zeros
from megatron_llep.planner.loops.jit import helper
from megatron_llep.planner.loops.queue import insert


@helper
def spread_in_node(
    of_node: np.ndarray,
    first: int,
    last: int,
    quota: np.ndarray,
    load: np.ndarray,
    slots: np.ndarray,
) -> None:
    """Give each expert that a node borrows to one of its ranks: the least loaded with a slot.

    The largest goes first. What finds no slot goes back to its home.

    Args:
        of_node: [E] pairs that the node computes.
        first: of its ranks.
        last: after the last of them.
        quota: int64 [E, P]; updated, as are the rest.
        load: int64 [P] pairs of each rank.
        slots: int64 [P] foreign slots that are free.
    """
    E, P = quota.shape
    M = E // P
    queue = zeros(E + 1)
    for expert in range(E):
        if of_node[expert] and not first * M <= expert < last * M:
            insert(queue, of_node[expert] * E + E - 1 - expert)
    while queue[0]:
        key = queue[queue[0]]
        queue[0] -= 1
        expert, pairs = E - 1 - key % E, key // E
        to = expert // M
        for rank in range(first, last):
            if slots[rank] and (to == expert // M or load[rank] < load[to]):
                to = rank
        slots[to] -= to != expert // M
        quota[expert, to] += pairs
        load[to] += pairs


@helper
def even_out_ranks(
    first: int, last: int, most: int, quota: np.ndarray, load: np.ndarray, slots: np.ndarray
) -> None:
    """Let ranks with more than `most` pairs hand some on, among those from `first` to `last`.

    The rank with most goes first, with the expert that it has most pairs of, to the rank with the
    least room for all of its surplus of it, or else to that with most room.
    """
    E, P = quota.shape
    M = E // P
    is_stuck = zeros(P)
    while True:
        giver = -1
        for rank in range(first, last):
            if load[rank] > most and not is_stuck[rank] and (giver < 0 or load[rank] > load[giver]):
                giver = rank
        if giver < 0:
            return
        expert = 0
        for other in range(E):
            if quota[other, giver] > quota[expert, giver]:
                expert = other
        pairs = min(load[giver] - most, quota[expert, giver])
        to, to_room = -1, 0
        for rank in range(first, last):
            room = most - load[rank]
            holds = rank == expert // M or quota[expert, rank] > 0
            if room <= 0 or not (holds or slots[rank]):
                continue
            if to < 0 or (min(room, pairs), -room) > (min(to_room, pairs), -to_room):
                to, to_room = rank, room
        if to < 0:
            is_stuck[giver] = 1
            continue
        pairs = min(pairs, to_room)
        slots[to] -= to != expert // M and quota[expert, to] == 0
        quota[expert, to] += pairs
        quota[expert, giver] -= pairs
        slots[giver] += giver != expert // M and quota[expert, giver] == 0
        load[to] += pairs
        load[giver] -= pairs
