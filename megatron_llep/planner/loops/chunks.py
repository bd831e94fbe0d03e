"""Chunks, pairs or rows that stay together, put in another order, on the host.

Shape letters: C chunks, N pairs or rows in them, E experts.
"""

import numpy as np

from megatron_llep.planner.loops.arrays import total_of
from megatron_llep.planner.loops.jit import entry


@entry
def list_rows(chunks: np.ndarray) -> np.ndarray:
    """The rows int64 [N] of chunks [2, C], first row and length of each, one after another."""
    rows, n = np.empty(total_of(chunks[1]), np.int64), 0
    for chunk in range(chunks.shape[1]):
        for i in range(chunks[1, chunk]):
            rows[n] = chunks[0, chunk] + i
            n += 1
    return rows


@entry
def place_pairs(
    chunks: np.ndarray, pair_index: np.ndarray, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and places of the pairs of chunks, one chunk after another.

    Args:
        chunks: int64 [2, C], first pair and length of each.
        pair_index: int64 [N or more], place of each pair in the flattened routing map.
        num_experts: E.

    Returns:
        int64 [N], each pair's token; int64 [N], its place in the flattened routing map.
    """
    N, n = total_of(chunks[1]), 0
    tokens, pairs = np.empty(N, np.int64), np.empty(N, np.int64)
    for chunk in range(chunks.shape[1]):
        for i in range(chunks[0, chunk], chunks[0, chunk] + chunks[1, chunk]):
            tokens[n] = pair_index[i] // num_experts
            pairs[n] = pair_index[i]
            n += 1
    return tokens, pairs
