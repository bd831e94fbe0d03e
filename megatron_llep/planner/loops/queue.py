"""Ranks in ascending order of an amount of tokens, such as those each can still take.

A queue is an array of which the first number n says how many keys there are; they follow, at places
1 .. n. A key is `amount * P + id`, with ids 0 .. P-1. So the lowest id comes first among equal
amounts, and amounts up to 2**63 / P fit.
"""

import numpy as np

from megatron_llep.planner.loops.jit import helper

NO_KEY = 2**63 - 1
"""More than any key."""


@helper
def find(queue: np.ndarray, key: int) -> int:
    """Place of the first key that is not below this one; n + 1 if all are."""
    low, high = 1, queue[0] + 1
    while low < high:
        middle = (low + high) // 2
        if queue[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@helper
def insert(queue: np.ndarray, key: int) -> None:
    """Put a key in its place."""
    place = find(queue, key)
    queue[0] += 1
    for i in range(queue[0], place, -1):
        queue[i] = queue[i - 1]
    queue[place] = key


@helper
def take(queue: np.ndarray, place: int) -> int:
    """Remove the key at a place, and return it."""
    key = queue[place]
    for i in range(place, queue[0]):
        queue[i] = queue[i + 1]
    queue[0] -= 1
    return key
