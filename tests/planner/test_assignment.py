"""Which tokens go where: both sides agree, quotas are met, local first crosses least."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_routings import KINDS, REPRODUCIBLE, make_counts

from megatron_llep.planner import ORDERS, list_exchange, make_plan, plan_from_quota, receives, sends
from megatron_llep.planner.plan import native_quota
from megatron_llep.planner.topology import ONE_NODE, Topology


@st.composite
def assignments(draw):
    """A plan, the counts [R, E] it was made for, tp, and the nodes."""
    P = draw(st.sampled_from([1, 2, 3, 5, 8, 16]))
    M = draw(st.integers(1, 6))
    tp = draw(st.sampled_from([1, 1, 2, 4]))
    counts = make_counts(draw(st.sampled_from(KINDS)), P, M, draw(st.integers(0, 10_000)), tp)
    sizes = [None, *(size for size in range(1, P + 1) if P % size == 0)]
    topology = Topology(ranks_per_node=draw(st.sampled_from(sizes)))
    plan = make_plan(
        counts.reshape(P, tp, -1).sum(axis=1),
        planner=draw(st.sampled_from(["tolerant", "exact", "lla"])),
        max_foreign=draw(st.sampled_from([M, M // 2])),
        min_tokens_per_gemm=1,
        imbalance_threshold=0.0,
    )
    return plan, counts, tp, topology


def all_sends(plan, counts, order, topology=ONE_NODE):
    """[R, E, P]."""
    return np.stack([sends(plan, counts, source, order, topology) for source in range(len(counts))])


@pytest.mark.parametrize("order", ORDERS)
@settings(REPRODUCIBLE, max_examples=200)
@given(case=assignments())
def test_senders_and_receivers_agree(order, case):
    plan, counts, tp, topology = case
    sent = all_sends(plan, counts, order, topology)
    assert sent.dtype == np.int64
    assert (sent >= 0).all()
    np.testing.assert_array_equal(sent.sum(axis=2), counts)
    np.testing.assert_array_equal(sent.sum(axis=0), plan.quota)
    M = plan.experts_per_rank
    for rank in range(plan.num_ranks):
        slots = list(range(rank * M, (rank + 1) * M)) + plan.foreign_experts[rank].tolist()
        got = receives(plan, counts, rank, order, topology)
        assert got.shape == (len(counts), M + plan.max_foreign)
        for slot, expert in enumerate(slots):
            expected = sent[:, expert, rank] if expert >= 0 else 0
            np.testing.assert_array_equal(got[:, slot], np.broadcast_to(expected, len(counts)))
        for source in range(rank * tp, (rank + 1) * tp):
            _, to_ranks, received, coming = list_exchange(plan, counts, source, order, topology)
            np.testing.assert_array_equal(to_ranks, sent[source].sum(axis=0))
            np.testing.assert_array_equal(coming.swapaxes(0, 1).reshape(got.shape), got)
            np.testing.assert_array_equal(received, coming.sum(axis=2))


def crossing(sent, tp, group_size):
    """[E] tokens that leave their group of consecutive ranks."""
    P = sent.shape[2]
    source_group = np.arange(len(sent)) // tp // group_size
    stay = source_group[:, None] == np.arange(P) // group_size
    return (sent * ~stay[:, None, :]).sum(axis=(0, 2))


@settings(REPRODUCIBLE, max_examples=200)
@given(case=assignments())
def test_local_first_keeps_all_that_may_stay(case):
    plan, counts, tp, topology = case
    P = plan.num_ranks
    local = all_sends(plan, counts, "local_first", topology)
    ordered = all_sends(plan, counts, "rank_order", topology)
    for size in (1, topology.node_size(P)):
        by_group = counts.reshape(P // size, size * tp, -1).sum(axis=1)
        quota = plan.quota.T.reshape(P // size, size, -1).sum(axis=1)
        could_stay = np.minimum(by_group, quota).sum(axis=0)
        left = crossing(local, tp, size)
        np.testing.assert_array_equal(left, counts.sum(axis=0) - could_stay)
        assert (left <= crossing(ordered, tp, size)).all()


def test_the_node_comes_before_the_others_by_hand():
    # Six ranks on three nodes, expert 0: ranks 3 and 5 have 3 tokens each, and one for themselves;
    # rank 0 and rank 2 compute 2 each.
    quota = np.zeros((6, 6), dtype=np.int64)
    quota[0] = [2, 0, 2, 1, 0, 1]
    counts = np.zeros((6, 6), dtype=np.int64)
    counts[[3, 5], 0] = 3
    plan = plan_from_quota(quota)
    nodes = Topology(ranks_per_node=2)
    # Rank 3 sends its two to rank 2, of its node; rank 5's two cross.
    sent = all_sends(plan, counts, "local_first", nodes)[:, 0]
    assert sent[3].tolist() == [0, 0, 2, 1, 0, 0]
    assert sent[5].tolist() == [2, 0, 0, 0, 0, 1]
    assert receives(plan, counts, 2, topology=nodes)[:, 1].tolist() == [0, 0, 0, 2, 0, 0]
    # On one node they go in rank order, and all four cross a node.
    sent = all_sends(plan, counts, "local_first")[:, 0]
    assert sent[3].tolist() == [2, 0, 0, 1, 0, 0]
    assert sent[5].tolist() == [0, 0, 2, 0, 0, 1]


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
    for count in (sends, receives, lambda *args: list_exchange(*args)[0]):
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
