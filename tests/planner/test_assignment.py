"""Which tokens go where: both sides agree, quotas are met, local first crosses least."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_routings import KINDS, REPRODUCIBLE, make_counts

from megatron_llep.planner import ORDERS, make_plan, plan_from_quota, receives, sends
from megatron_llep.planner.plan import native_quota


@st.composite
def assignments(draw):
    """A plan, the counts [R, E] it was made for, and tp."""
    P = draw(st.sampled_from([1, 2, 3, 5, 8, 16]))
    M = draw(st.integers(1, 6))
    tp = draw(st.sampled_from([1, 1, 2, 4]))
    counts = make_counts(draw(st.sampled_from(KINDS)), P, M, draw(st.integers(0, 10_000)), tp)
    plan = make_plan(
        counts.reshape(P, tp, -1).sum(axis=1),
        planner=draw(st.sampled_from(["exact", "lla"])),
        max_foreign=draw(st.sampled_from([M, M // 2])),
        min_tokens_per_gemm=1,
        imbalance_threshold=0.0,
    )
    return plan, counts, tp


def all_sends(plan, counts, order):
    """[R, E, P]."""
    return np.stack([sends(plan, counts, source, order) for source in range(len(counts))])


@pytest.mark.parametrize("order", ORDERS)
@settings(REPRODUCIBLE, max_examples=200)
@given(case=assignments())
def test_senders_and_receivers_agree(order, case):
    plan, counts, _ = case
    sent = all_sends(plan, counts, order)
    assert sent.dtype == np.int64
    assert (sent >= 0).all()
    np.testing.assert_array_equal(sent.sum(axis=2), counts)
    np.testing.assert_array_equal(sent.sum(axis=0), plan.quota)
    M = plan.experts_per_rank
    for rank in range(plan.num_ranks):
        slots = list(range(rank * M, (rank + 1) * M)) + plan.foreign_experts[rank].tolist()
        got = receives(plan, counts, rank, order)
        assert got.shape == (len(counts), M + plan.max_foreign)
        for slot, expert in enumerate(slots):
            expected = sent[:, expert, rank] if expert >= 0 else 0
            np.testing.assert_array_equal(got[:, slot], np.broadcast_to(expected, len(counts)))


def crossing(sent, tp):
    """[E] tokens that leave their rank."""
    P = sent.shape[2]
    stay = np.arange(len(sent))[:, None] // tp == np.arange(P)
    return (sent * ~stay[:, None, :]).sum(axis=(0, 2))


@settings(REPRODUCIBLE, max_examples=200)
@given(case=assignments())
def test_local_first_keeps_all_that_may_stay(case):
    plan, counts, tp = case
    P = plan.num_ranks
    local = crossing(all_sends(plan, counts, "local_first"), tp)
    by_rank = counts.reshape(P, tp, -1).sum(axis=1)
    could_stay = np.minimum(by_rank, plan.quota.T).sum(axis=0)
    np.testing.assert_array_equal(local, counts.sum(axis=0) - could_stay)
    assert (local <= crossing(all_sends(plan, counts, "rank_order"), tp)).all()


def test_orders_by_hand():
    # One expert per rank, two ranks of two sources each. Expert 0: sources hold 3 2 | 4 1, rank 0
    # computes 6 and rank 1 4.
    quota = np.array([[6, 4], [0, 0]])
    counts = np.array([[3, 0], [2, 0], [4, 0], [1, 0]])
    plan = plan_from_quota(quota)
    # Rank 0 keeps its 5 and has room for 1; rank 1 keeps 4, source 2's. Source 3's one crosses.
    local = all_sends(plan, counts, "local_first")[:, 0]
    assert local.tolist() == [[3, 0], [2, 0], [0, 4], [1, 0]]
    # In source order the first 6 go to rank 0: 3, 2 and one of source 2.
    ordered = all_sends(plan, counts, "rank_order")[:, 0]
    assert ordered.tolist() == [[3, 0], [2, 0], [1, 3], [0, 1]]
    assert receives(plan, counts, 1).tolist() == [[0, 0], [0, 0], [0, 4], [0, 0]]


@pytest.mark.parametrize("order", ORDERS)
def test_without_lending_everything_goes_home(order):
    counts = make_counts("lognormal", 4, 4, 0, tp=2)
    plan = plan_from_quota(native_quota(counts.sum(axis=0), 4))
    for source in range(8):
        home = np.arange(16)[:, None] // 4 == np.arange(4)
        np.testing.assert_array_equal(
            sends(plan, counts, source, order), counts[source][:, None] * home
        )
    np.testing.assert_array_equal(receives(plan, counts, 2, order), counts[:, 8:12])


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.uint64])
@pytest.mark.parametrize("order", ORDERS)
def test_every_integer_type_is_counted_in_int64(order, dtype):
    counts = make_counts("lognormal", 4, 4, 0)
    plan = make_plan(counts)
    other = counts.astype(dtype)
    for count in (sends, receives):
        result = count(plan, other, 1, order)
        assert result.dtype == np.int64
        np.testing.assert_array_equal(result, count(plan, counts, 1, order))


def test_bad_arguments():
    counts = make_counts("lognormal", 4, 4, 0)
    plan = make_plan(counts)
    with pytest.raises(ValueError, match="order='random' is unknown"):
        sends(plan, counts, 0, "random")
    with pytest.raises(ValueError, match="counts_by_source"):
        receives(plan, counts[:3], 0)
    with pytest.raises(ValueError, match="counts_by_source"):
        sends(plan, counts[:, :8], 0)
