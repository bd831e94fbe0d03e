"""Sums and extremes of arrays: loops, which numba compiles faster than numpy's functions."""

import numpy as np
from numba import njit


@njit
def total_of(numbers: np.ndarray) -> int:
    """Their sum."""
    total = 0
    for number in numbers:
        total += number
    return total


@njit
def largest_of(numbers: np.ndarray) -> int:
    """The largest of numbers that are not negative; 0 if there are none."""
    largest = 0
    for number in numbers:
        largest = max(largest, number)
    return largest
