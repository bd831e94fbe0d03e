"""`lla` against traces worked by hand, and against the paper's loops written out in full."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_routings import REPRODUCIBLE, lla_quota, routings


def plan_loads(loads, ranks, alpha, m, slots=None):
    loads = np.array(loads)
    slots = len(loads) // ranks if slots is None else slots
    return lla_quota(loads, ranks, slots, capacity_factor=alpha, min_tokens_per_gemm=m).tolist()


def test_trace_native_takes_all_takes_a_part_takes_nothing():
    # Two ranks, two experts each: 60 30 | 5 5. Total 100, alpha 1: capacity 50.
    # g_a = 0 0, g_p = 90 10. Experts from most tokens: 0 (60), 1 (30), 2 (5), 3 (5).
    # Expert 0: g_p[0] = 30, na = 50 - 0 - 30 = 20, so 20 stay and 40 spill.
    #   LLAS: rank 1 has 50 - 0 - 10 = 40 of room; takes 40. g_a = 20 40.
    # Expert 1: g_p[0] = 0, na = 50 - 20 = 30 >= 30: all stay. g_a = 50 40.
    # Experts 2, 3: na = 50 - 40 - 5 = 5, then 50 - 45 - 0 = 5: all stay. g_a = 50 50.
    assert plan_loads([60, 30, 5, 5], 2, 1.0, 1) == [[20, 40], [30, 0], [0, 5], [0, 5]]


def test_trace_home_without_room_spills_the_whole_expert():
    # Three ranks, two experts each: 50 49 | 0 21 | 0 0. Total 120, capacity 40.
    # g_p = 99 21 0.
    # Expert 0 (50): g_p[0] = 49, na = 40 - 49 < 0: all 50 spill.
    #   Round 1: rank 2 is least loaded (0) and takes 40. Rounds 2: rank 1 (21) has 19 >= 10,
    #   takes the last 10. g_a = 0 10 40.
    # Expert 1 (49): g_p[0] = 0, na = 40: 40 stay, 9 spill. Rank 1 (10 + 21 = 31) has 9. Takes 9.
    # Expert 3 (21): na = 40 - 19 - 0 = 21: all stay. Loads 40 40 40.
    assert plan_loads([50, 49, 0, 21, 0, 0], 3, 1.0, 1) == [
        [0, 10, 40],
        [40, 9, 0],
        [0, 0, 0],
        [0, 21, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]


def test_trace_small_chunks_are_skipped_and_the_rest_is_forced_on_the_least_loaded():
    # Three ranks, one expert each: 70 | 25 | 25. Total 120, capacity 40, m = 20.
    # Expert 0: na = 40, 30 spill. Ranks 1 and 2 (25 each) have room for 15 < 20 of 30: both are
    # skipped, so rank 1 (lowest id) is forced to take all 30: load 55.
    # Expert 1: g_p[1] = 0, na = 40 - 30 = 10: 10 stay, 15 spill. Rank 2 (25) has room for all
    # 15: the last chunk may be smaller than m. Loads 40 40 40.
    # Expert 2: na = 40 - 15 = 25: all stay.
    assert plan_loads([70, 25, 25], 3, 1.0, 20) == [[40, 30, 0], [0, 10, 15], [0, 0, 25]]
    # With m = 15 the chunk of 15 is large enough: 15 to rank 1, then 15 to rank 2.
    assert plan_loads([70, 25, 25], 3, 1.0, 15) == [[40, 15, 15], [0, 25, 0], [0, 0, 25]]


def test_trace_capacity_factor_leaves_slack():
    # 80 | 20 | 20, alpha 1.5: capacity 60. Expert 0 keeps 60; 20 spill to rank 1 (room 40).
    assert plan_loads([80, 20, 20], 3, 1.5, 1) == [[60, 20, 0], [0, 20, 0], [0, 0, 20]]
    # alpha 2: capacity 80, everything fits at home.
    assert plan_loads([80, 20, 20], 3, 2.0, 1) == [[80, 0, 0], [0, 20, 0], [0, 0, 20]]


def test_trace_capacity_is_rounded_up():
    # Total 10 over 3 ranks: capacity ceil(3.33) = 4. Expert 0 keeps 4, 4 to rank 1, 2 to rank 2.
    assert plan_loads([10, 0, 0], 3, 1.0, 1) == [[4, 4, 2], [0, 0, 0], [0, 0, 0]]
    # alpha 1.1 of a mean of 10 is 11 (1.1 * 10 is above 11 in floating point).
    assert plan_loads([20, 0], 2, 1.1, 1) == [[11, 9], [0, 0]]


def test_trace_slot_bound():
    # Two ranks, two experts each, one foreign slot: 30 30 | 0 0. Capacity 30.
    # Expert 0: g_p[0] = 30, na = 0: all 30 spill to rank 1. Expert 1: na = 30, stays.
    assert plan_loads([30, 30, 0, 0], 2, 1.0, 1, slots=1)[:2] == [[0, 30], [30, 0]]
    # 20 20 20 | 0 0 0: capacity 30. Expert 0: na = 30 - 40 < 0, all 20 spill: the slot is taken.
    # Expert 1: na = 30 - 20 = 10, 10 are to spill, but no rank has a slot: they stay at home.
    assert plan_loads([20, 20, 20, 0, 0, 0], 2, 1.0, 1, slots=1)[:3] == [[0, 20], [20, 0], [20, 0]]
    assert plan_loads([20, 20, 20, 0, 0, 0], 2, 1.0, 1)[:3] == [[0, 20], [10, 10], [20, 0]]


def write_out_the_paper(loads, P, alpha, m):
    """Algorithms 2 and 3 with the paper's two load vectors, three cases and scan over ranks."""
    E = len(loads)
    M = E // P
    m_alpha = math.ceil(round(alpha * sum(loads) / P, 6))
    g_a = [0] * P
    g_p = [sum(loads[g * M : (g + 1) * M]) for g in range(P)]
    quota = [[0] * P for _ in range(E)]

    def spill(expert, home, r):
        while r > 0:
            others = sorted((o for o in range(P) if o != home), key=lambda o: (g_a[o] + g_p[o], o))
            if not others:
                quota[expert][home] += r
                g_a[home] += r
                return
            chosen, chunk = others[0], r
            for o in others:
                room = m_alpha - g_a[o] - g_p[o]
                c = min(r, room)
                if room <= 0 or (c < m and r > c):
                    continue
                chosen, chunk = o, c
                break
            quota[expert][chosen] += chunk
            g_a[chosen] += chunk
            r -= chunk

    for expert in sorted(range(E), key=lambda e: (-loads[e], e)):
        v = loads[expert]
        home = expert // M
        g_p[home] -= v
        na = m_alpha - g_a[home] - g_p[home]
        if na >= v:
            quota[expert][home] = v
            g_a[home] += v
        elif na > 0:
            quota[expert][home] = na
            g_a[home] += na
            spill(expert, home, v - na)
        else:
            spill(expert, home, v)
    return quota


@REPRODUCIBLE
@given(
    routing=routings(max_ranks=16, max_experts=128),
    alpha=st.sampled_from([1.0, 1.1, 1.37, 2.0]),
    m=st.sampled_from([0, 1, 20, 100, 1024]),
)
def test_equal_to_the_paper_written_out(routing, alpha, m):
    loads = routing[0].sum(axis=0)
    P = routing[0].shape[0]
    # No bound: a slot for every expert.
    quota = lla_quota(loads, P, len(loads), capacity_factor=alpha, min_tokens_per_gemm=m)
    assert quota.tolist() == write_out_the_paper(loads.tolist(), P, alpha, m)


@pytest.mark.parametrize("m", [1, 300])
def test_capacity_holds_where_no_chunk_is_forced(m):
    loads = np.array([900, 20, 10, 10, 30, 30, 0, 0])
    quota = lla_quota(loads, 4, 2, capacity_factor=1.2, min_tokens_per_gemm=m)
    # capacity 300: 270 and 230 are smaller than m = 300, and are forced where they are no rest.
    assert (quota.sum(axis=0).max() <= 300) == (m == 1)
