"""Ranks in ascending order of an amount of tokens, such as those each can still take.

A queue is the first n keys of an array; a key is `amount * P + id`, with ids 0 .. P-1. So the
lowest id comes first among equal amounts, and amounts up to 2**63 / P fit.
"""

import numpy as np
from numba import njit


@njit
def find(queue: np.ndarray, n: int, key: int) -> int:
    """Place of the first key that is not below this one; n if all are."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        if queue[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@njit
def insert(queue: np.ndarray, n: int, key: int) -> None:
    """Put a key in its place; the queue then has n + 1."""
    place = find(queue, n, key)
    for i in range(n, place, -1):
        queue[i] = queue[i - 1]
    queue[place] = key


@njit
def remove(queue: np.ndarray, n: int, place: int) -> None:
    """Close the gap of a key; the queue then has n - 1."""
    for i in range(place, n - 1):
        queue[i] = queue[i + 1]
