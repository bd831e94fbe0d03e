"""Moves: rows (expert, borrower, tokens) of an int64 array."""

import numpy as np

from megatron_llep.planner.loops.jit import helper


@helper
def new_moves(n: int) -> np.ndarray:
    """Room for n moves, int64 [n, 3]."""
    return np.empty((n, 3), np.int64)


@helper
def set_move(moves: np.ndarray, i: int, expert: int, borrower: int, tokens: int) -> None:
    """Write move i."""
    moves[i, 0] = expert
    moves[i, 1] = borrower
    moves[i, 2] = tokens
