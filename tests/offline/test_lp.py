"""Planner `lp`: the least possible largest load, as the solver says, in whole tokens."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.offline.lp import lp_quota, solve_lp
from megatron_llep.planner import make_plan
from planner.planner_routings import REPRODUCIBLE


@st.composite
def problems(draw) -> tuple[np.ndarray, np.ndarray]:
    """Loads [E] and holders [E, P]; every expert has one."""
    P, E = draw(st.integers(1, 10)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    if draw(st.booleans()):
        loads = rng.integers(0, draw(st.sampled_from([2, 30, 3000])), E)
    else:
        loads = rng.lognormal(2, 2, E).astype(np.int64)
    holders = rng.random((E, P)) < draw(st.sampled_from([0.0, 0.1, 0.3, 0.7]))
    holders[np.arange(E), rng.integers(0, P, E)] = True
    return loads, holders


@REPRODUCIBLE
@given(problems())
def test_the_flow_reaches_the_solvers_optimum(problem):
    loads, holders = problem
    quota = lp_quota(loads, holders)
    assert quota.dtype == np.int64
    assert (quota >= 0).all()
    assert not quota[~holders].any()
    assert np.array_equal(quota.sum(axis=1), loads)
    assert quota.sum(axis=0).max() == math.ceil(solve_lp(loads, holders) - 1e-6)


def test_tokens_move_on_along_a_chain_of_shared_experts():
    # Expert e is on ranks e and e + 1: level only if each passes on what it was passed.
    P = 6
    holders = np.eye(P, dtype=bool)
    holders[np.arange(P - 1), np.arange(1, P)] = True
    loads = np.array([0, 0, 0, 0, 60, 0])
    assert lp_quota(loads, holders).sum(axis=0).tolist() == [0, 0, 0, 0, 30, 30]
    quota = lp_quota(np.array([12, 12, 12, 12, 12, 0]), holders)
    assert quota.sum(axis=0).tolist() == [10] * P
    assert quota.diagonal().tolist() == [10, 8, 6, 4, 2, 0]


def test_ranks_that_nothing_leads_out_of_set_the_bound():
    # 30 tokens on ranks 0 and 1 alone, though rank 2 is idle.
    holders = np.array([[True, False, False], [True, True, False], [False, False, True]])
    quota = lp_quota(np.array([20, 10, 0]), holders)
    assert quota.tolist() == [[20, 0, 0], [0, 10, 0], [0, 0, 0]]
    assert solve_lp(np.array([20, 10, 0]), holders) == 20


def test_experts_of_one_class_are_cut_in_order():
    holders = np.ones((3, 2), dtype=bool)
    quota = lp_quota(np.array([5, 4, 3]), holders)
    assert quota.tolist() == [[5, 0], [1, 3], [0, 3]]


def test_an_expert_without_tokens_needs_no_holder():
    holders = np.array([[True], [False]])
    assert lp_quota(np.array([3, 0]), holders).tolist() == [[3], [0]]


@pytest.mark.parametrize("solve", [lp_quota, solve_lp])
@pytest.mark.parametrize(
    ("loads", "holders", "message"),
    [
        ([1, 2], [[True], [False]], "expert 1 has 2 tokens and no rank"),
        ([1], [[True], [True]], r"loads \[1\] and holders \[2, 1\]"),
        ([], np.zeros((0, 2)), "must be"),
    ],
)
def test_bad_problems_are_refused(solve, loads, holders, message):
    with pytest.raises(ValueError, match=message):
        solve(np.array(loads, dtype=np.int64), np.array(holders, dtype=bool))


def test_without_replicas_the_planner_lends_nothing():
    counts = np.array([[9, 0], [9, 0]])
    plan = make_plan(counts, planner="lp", imbalance_threshold=0)
    assert plan.is_fallback
    assert plan.imbalance_after == plan.imbalance_before == 2
