"""What every plan promises, and the bounds of `exact`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_routings import (
    KINDS,
    REPRODUCIBLE,
    SIMPLE_PLANNERS,
    exact_quota,
    lla_quota,
    make_counts,
    routings,
)

from megatron_llep.planner import make_plan

lla_options = st.fixed_dictionaries(
    {
        "capacity_factor": st.sampled_from([1.0, 1.1, 1.5, 3.0]),
        "min_tokens_per_gemm": st.sampled_from([0, 1, 64, 1024]),
    }
)


@pytest.mark.parametrize("planner", SIMPLE_PLANNERS)
@REPRODUCIBLE
@given(routing=routings(), options=lla_options, threshold=st.sampled_from([0.0, 1.0, 1.3, 4.0]))
def test_every_plan_keeps_the_invariants(planner, routing, options, threshold):
    counts, max_foreign = routing
    plan = make_plan(
        counts,
        planner=planner,
        max_foreign=max_foreign,
        imbalance_threshold=threshold,
        **options,
    )
    plan.validate(counts, max_foreign)
    assert plan.quota.dtype == plan.foreign_experts.dtype == plan.transfers.dtype == np.int64
    assert (plan.quota >= 0).all()
    np.testing.assert_array_equal(plan.quota.sum(axis=1), counts.sum(axis=0))
    P, M = plan.num_ranks, plan.experts_per_rank
    home = np.arange(plan.num_experts) // M
    for rank in range(P):
        foreign = [e for e in range(P * M) if plan.quota[e, rank] and home[e] != rank]
        assert len(foreign) <= max_foreign
        empty = [-1] * (plan.max_foreign - len(foreign))
        assert plan.foreign_experts[rank].tolist() == foreign + empty
    lent = {
        (e, int(home[e]), g) for e, g in zip(*np.nonzero(plan.quota), strict=True) if home[e] != g
    }
    assert [tuple(row) for row in plan.transfers] == sorted(lent, key=lambda t: (t[1], t[2], t[0]))
    assert plan.imbalance_after <= plan.imbalance_before
    if plan.imbalance_before < threshold:
        assert plan.is_fallback
    if plan.is_fallback:
        assert plan.max_foreign == len(plan.transfers) == 0
        assert plan.imbalance_after == plan.imbalance_before
    before, after = plan.load_per_rank_before, plan.load_per_rank_after
    if counts.sum():
        assert plan.imbalance_before == pytest.approx(before.max() / before.mean())
        assert plan.imbalance_after == pytest.approx(after.max() / after.mean())
    else:
        assert plan.imbalance_before == plan.imbalance_after == 1.0


@REPRODUCIBLE
@given(routing=routings())
def test_exact_is_perfectly_balanced_within_its_bounds(routing):
    counts, _ = routing
    P, E = counts.shape
    loads = counts.sum(axis=0)
    quota = exact_quota(loads, P, E // P)
    share, extra = divmod(int(loads.sum()), P)
    np.testing.assert_array_equal(quota.sum(axis=0), share + (np.arange(P) < extra))
    home = np.arange(E) // (E // P)
    expert, rank = np.nonzero(quota)
    lent = home[expert] != rank
    assert lent.sum() <= E + P - 1
    for borrower in range(P):
        lenders = set(home[expert[lent & (rank == borrower)]])
        assert len(lenders) <= 1, "one lender per borrower"
        assert (lent & (rank == borrower)).sum() <= E // P


@REPRODUCIBLE
@given(routing=routings())
def test_exact_with_few_slots_never_makes_a_rank_worse(routing):
    counts, max_foreign = routing
    P = len(counts)
    loads = counts.sum(axis=0)
    after = exact_quota(loads, P, max_foreign).sum(axis=0)
    before = loads.reshape(P, -1).sum(axis=1)
    share, extra = divmod(int(loads.sum()), P)
    cap = share + (np.arange(P) < extra)
    assert (after <= np.maximum(before, cap)).all()


def test_exact_settles_a_lender_that_also_borrows_before_its_own_lender():
    # Two experts a rank: 7 7 | 0 0 | 13 0, total 27, cap 9. Rank 0 (surplus 5, the largest) fills
    # rank 1 (needs 9) and is then 4 short, which rank 2 (surplus 4) lends it.
    loads = np.array([7, 7, 0, 0, 13, 0])
    assert exact_quota(loads, 3, 2).tolist() == [
        [0, 7, 0],
        [5, 2, 0],
        [0, 0, 0],
        [0, 0, 0],
        [4, 0, 9],
        [0, 0, 0],
    ]
    # With one slot rank 1 takes only expert 0, rank 0 keeps 2 more and borrows 2 instead of 4.
    assert exact_quota(loads, 3, 1).tolist() == [
        [0, 7, 0],
        [7, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [2, 0, 11],
        [0, 0, 0],
    ]


def test_exact_by_hand():
    # P=3, M=2. Loads 10 4 | 1 0 | 0 0: total 15, cap 5 each, surplus 9, -4, -5. Rank 0 fills
    # rank 2 (5, the larger need) and then rank 1 (4). Serving 5: expert 0 (10 left) gives 5.
    # Serving 4: expert 0 (5 left) gives 4. Left at home: 1 and 4.
    quota = exact_quota(np.array([10, 4, 1, 0, 0, 0]), 3, 2)
    assert quota.tolist() == [
        [1, 4, 5],
        [4, 0, 0],
        [0, 1, 0],
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]
    # P=2, M=3. Loads 4 4 3 | 0 0 0: total 11, caps 6 and 5. Rank 1 needs 5: expert 0 (the lower
    # of two with 4) gives all 4, expert 1 the last one.
    quota = exact_quota(np.array([4, 4, 3, 0, 0, 0]), 2, 3)
    assert quota[:3].tolist() == [[0, 4], [3, 1], [3, 0]]
    # With one foreign slot the last token stays at home.
    quota = exact_quota(np.array([4, 4, 3, 0, 0, 0]), 2, 1)
    assert quota[:3].tolist() == [[0, 4], [4, 0], [3, 0]]
    # The expert with most tokens is not the first: 1 2 8 | 0 0 0, caps 6 and 5, all 5 from 8.
    quota = exact_quota(np.array([1, 2, 8, 0, 0, 0]), 2, 3)
    assert quota[:3].tolist() == [[1, 0], [2, 0], [3, 5]]


def test_exact_lender_falls_below_its_cap_and_borrows():
    # Loads 11 | 0 | 19, cap 10. Rank 2 (surplus 9) fills rank 1 (needs 10) and is then 1 short,
    # which rank 0 (surplus 1) lends it.
    quota = exact_quota(np.array([11, 0, 19]), 3, 1)
    assert quota.tolist() == [[10, 0, 1], [0, 0, 0], [0, 10, 9]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("planner", SIMPLE_PLANNERS)
def test_the_largest_size(planner, kind):
    counts = make_counts(kind, P=64, M=8, seed=1)
    plan = make_plan(counts, planner=planner, min_tokens_per_gemm=1, imbalance_threshold=0.0)
    plan.validate(counts, max_foreign=8)
    if planner == "exact" and not plan.is_fallback:
        assert plan.load_per_rank_after.max() == -(-counts.sum() // 64)


@pytest.mark.parametrize("planner", SIMPLE_PLANNERS)
def test_same_counts_same_plan(planner):
    counts = make_counts("lognormal", P=8, M=16, seed=3)
    plans = [
        make_plan(array, planner=planner, min_tokens_per_gemm=64)
        for array in (counts, counts.copy(), np.asfortranarray(counts), counts.astype(np.int32))
    ]
    for plan in plans[1:]:
        for name in ("quota", "foreign_experts", "transfers"):
            np.testing.assert_array_equal(getattr(plan, name), getattr(plans[0], name))
        assert plan.imbalance_after == plans[0].imbalance_after


def test_only_the_loads_matter_to_the_quotas():
    counts = make_counts("lognormal", P=8, M=4, seed=3)
    shuffled = np.random.default_rng(0).permuted(counts, axis=0)
    np.testing.assert_array_equal(make_plan(counts).quota, make_plan(shuffled).quota)


def test_lla_without_slots_lends_nothing():
    loads = np.array([100, 0, 0, 0])
    quota = lla_quota(loads, 4, 0, capacity_factor=1.0, min_tokens_per_gemm=1)
    assert quota[0].tolist() == [100, 0, 0, 0]
