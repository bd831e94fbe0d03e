"""Rows and tables of int64, and their sums and extremes.

Loops of our own: numba compiles numpy's functions anew for each kind of argument.
"""

import numpy as np

from megatron_llep.planner.loops.jit import helper


@helper
def zeros(length: int) -> np.ndarray:
    """int64 [length], all 0."""
    row = np.empty(length, np.int64)
    for i in range(length):
        row[i] = 0
    return row


@helper
def zero_table(length: int, width: int) -> np.ndarray:
    """int64 [length, width], all 0."""
    table = np.empty((length, width), np.int64)
    for i in range(length):
        for k in range(width):
            table[i, k] = 0
    return table


@helper
def total_of(numbers: np.ndarray) -> int:
    """Their sum."""
    total = 0
    for number in numbers:
        total += number
    return total


@helper
def largest_of(numbers: np.ndarray) -> int:
    """The largest of numbers that are not negative; 0 if there are none."""
    largest = 0
    for number in numbers:
        largest = max(largest, number)
    return largest
