"""Least-Loaded Assignment, the planner of the LLEP paper (arXiv 2601.17111, Algorithms 2 and 3).

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import math

import numpy as np


def lla_quota(
    loads: np.ndarray,
    num_ranks: int,
    max_foreign: int,
    *,
    capacity_factor: float,
    min_tokens_per_gemm: int,
) -> np.ndarray:
    """Quotas of Algorithm 2 (LLA), which spills with Algorithm 3 (LLAS).

    The paper keeps two loads per rank: assigned (g_a) and pending (g_p, native experts not yet
    visited). Here `load` is their sum, the *effective load*. No rank should exceed the capacity
    m_alpha = alpha * total / P. Experts are visited from the most to the fewest tokens (lowest
    id first among equals). With g_p reduced by the expert's v tokens, its home has room for
    na = m_alpha - g_a - g_p = m_alpha - load + v of them:

    - na >= v: home takes all;
    - 0 < na < v: home takes na, v - na spill;
    - na <= 0: all v spill.

    In every case min(v, load - m_alpha) tokens spill, if that is positive.

    LLAS gives r spilled tokens away in rounds. It goes through the other ranks from the least
    effective load up (lowest id first) and gives the first one with room c = min(r, m_alpha -
    load) tokens, but skips a rank where c < m and c < r; if every rank is full or skipped, the
    least loaded takes all r, above the capacity. The room falls along that order, so a round
    always ends at the least-loaded rank, which takes c, or r where c < m. It is then full, so
    no rank takes two chunks of an expert.

    What differs from the paper:

    - m_alpha is rounded up to whole tokens (down, alpha = 1 could not hold all tokens).
    - Slot bound: a rank that holds `max_foreign` foreign experts is no candidate for a further
      one. If no candidate is left, or none with room, the rest of the expert's tokens stay at
      home. (Without the bound some candidate always has room.)

    Args:
        loads: int64 [E] tokens per expert.
        num_ranks: P, divides E.
        max_foreign: most foreign experts per rank, 0 .. M.
        capacity_factor: alpha, at least 1.
        min_tokens_per_gemm: m, the fewest tokens worth a GEMM of their own.

    Returns:
        int64 [E, P] tokens of each expert that each rank computes.
    """
    P = num_ranks
    M = len(loads) // P
    load = loads.reshape(P, M).sum(axis=1).tolist()
    # Rounded first, so that 1.1 * 10 is 11 and not a token more.
    capacity = math.ceil(round(capacity_factor * sum(load) / P, 6))
    free_slots = [max_foreign] * P
    candidates = list(range(P)) if max_foreign else []
    left = loads.tolist()
    experts: list[int] = []
    borrowers: list[int] = []
    tokens: list[int] = []

    for expert in np.argsort(-loads, kind="stable").tolist():
        home = expert // M
        rest = min(left[expert], load[home] - capacity)
        while rest > 0 and candidates:
            borrower = min(candidates, key=load.__getitem__)
            room = capacity - load[borrower]
            # With tokens to spill the home itself is above the capacity, so it ends here too.
            if room <= 0:
                break
            chunk = min(rest, room)
            if chunk < min_tokens_per_gemm:
                chunk = rest
            experts.append(expert)
            borrowers.append(borrower)
            tokens.append(chunk)
            free_slots[borrower] -= 1
            if not free_slots[borrower]:
                candidates.remove(borrower)
            left[expert] -= chunk
            load[home] -= chunk
            load[borrower] += chunk
            rest -= chunk

    quota = np.zeros((P * M, P), dtype=np.int64)
    native_expert = np.arange(P * M)
    quota[native_expert, native_expert // M] = left
    quota[experts, borrowers] = tokens
    return quota
