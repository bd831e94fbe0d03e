"""Moves: rows (expert, borrower, tokens) of an int64 array."""

import numpy as np
from numba import njit


@njit
def set_move(moves: np.ndarray, i: int, expert: int, borrower: int, tokens: int) -> None:
    """Write move i."""
    moves[i, 0] = expert
    moves[i, 1] = borrower
    moves[i, 2] = tokens


@njit
def copy_move(source: np.ndarray, i: int, target: np.ndarray, k: int) -> None:
    """Write move i of the source as move k of the target."""
    set_move(target, k, source[i, 0], source[i, 1], source[i, 2])
