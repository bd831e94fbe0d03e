"""First-fit packing: conversations of known length into packs of one sequence length.

First-fit puts each conversation into the first pack that still has room for it. It needs at most
1.7 times as many packs as would do (Dósa and Sgall, STACS 2013), and far fewer than that where
most conversations are short.
"""

from collections.abc import Sequence

import numpy as np


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items in the order given.

    Args:
        lengths: of the items, each at most capacity.
        capacity: of a pack.

    Returns:
        For each pack the indices of its items, packs and items in the order of their filling.

    Raises:
        ValueError: an item is longer than a pack.
    """
    if any(length > capacity for length in lengths):
        raise ValueError(f"an item of length {max(lengths)} does not fit a pack of {capacity}")
    size = 1
    while size < len(lengths):
        size *= 2
    # A binary tree over packs: a node holds the most room that a pack below it has.
    room = [capacity] * (2 * size)
    packs: list[list[int]] = []
    for item, length in enumerate(lengths):
        node = 1
        while node < size:  # to the left wherever there is room
            node *= 2
            node += room[node] < length
        if node - size == len(packs):
            packs.append([])
        packs[node - size].append(item)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


def pack_epoch(lengths: np.ndarray, capacity: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The packs of one epoch: another order of the items each time, from the seed alone.

    Args:
        lengths: int [N].
        capacity: of a pack.
        seed: of the data.
        epoch: counted from 0.

    Returns:
        For each pack the indices of its items. Packs are shuffled too: first-fit leaves the
        emptiest ones to the end.
    """
    shuffle = np.random.default_rng((seed, epoch))
    order = shuffle.permutation(len(lengths))
    packs = first_fit(lengths[order].tolist(), capacity)
    return [order[packs[index]].tolist() for index in shuffle.permutation(len(packs))]
