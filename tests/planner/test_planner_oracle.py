"""Plans against the linear program over the same holders, and against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_routings import REPRODUCIBLE, SIMPLE_PLANNERS, routings
from scipy.optimize import linprog

from megatron_llep.planner import make_plan


def least_max_load(loads, holders):
    """Minimise the largest load: x[e, g] >= 0 on holders, rows sum to loads, columns <= t."""
    expert, rank = np.nonzero(holders)
    n = len(expert)
    sums = np.zeros((len(loads), n + 1))
    sums[expert, np.arange(n)] = 1
    tops = np.zeros((holders.shape[1], n + 1))
    tops[rank, np.arange(n)] = 1
    tops[:, n] = -1
    cost = np.zeros(n + 1)
    cost[n] = 1
    result = linprog(cost, tops, np.zeros(len(tops)), sums, loads, method="highs")
    assert result.status == 0
    return result.fun


@pytest.mark.parametrize("planner", SIMPLE_PLANNERS)
@settings(REPRODUCIBLE, max_examples=150)
@given(
    routing=routings(max_ranks=8, max_experts=64),
    m=st.sampled_from([0, 50]),
)
def test_no_plan_beats_the_optimum_of_its_holders(planner, routing, m):
    counts, max_foreign = routing
    plan = make_plan(
        counts,
        planner=planner,
        max_foreign=max_foreign,
        min_tokens_per_gemm=m,
        imbalance_threshold=0.0,
    )
    P, E = counts.shape
    native = np.arange(E)[:, None] // (E // P) == np.arange(P)
    optimum = least_max_load(counts.sum(axis=0), (plan.quota > 0) | native)
    largest = plan.load_per_rank_after.max()
    assert largest >= optimum - 1e-6
    if planner == "exact" and max_foreign == E // P:
        # Integers round the optimum up; a rank less than one token above it is optimal.
        assert largest <= np.ceil(optimum - 1e-6)
        assert largest == -(-counts.sum() // P)


@pytest.mark.parametrize("slots", [0, 1, 2])
@pytest.mark.parametrize("planner", SIMPLE_PLANNERS)
@pytest.mark.parametrize(
    "loads",
    [[9, 1, 0, 2], [5, 5, 1, 1], [12, 0, 0, 0], [3, 3, 3, 0], [7, 0, 6, 1], [1, 0, 0, 0]],
)
def test_no_plan_beats_every_split_tried_by_hand(planner, loads, slots):
    # Two ranks, two experts each: try every split of every expert, within the slot bound.
    best = sum(loads)
    for on_rank_0 in itertools.product(*(range(load + 1) for load in loads)):
        foreign_1 = sum(n < load for n, load in zip(on_rank_0[:2], loads[:2], strict=True))
        foreign_0 = sum(n > 0 for n in on_rank_0[2:])
        if max(foreign_0, foreign_1) <= slots:
            best = min(best, max(sum(on_rank_0), sum(loads) - sum(on_rank_0)))
    plan = make_plan(
        np.array([loads, [0] * 4]),
        planner=planner,
        max_foreign=slots,
        min_tokens_per_gemm=0,
        imbalance_threshold=0.0,
    )
    largest = plan.load_per_rank_after.max()
    assert largest >= best
    if slots == 2 and planner != "lp":  # which lends nothing
        assert largest == best
