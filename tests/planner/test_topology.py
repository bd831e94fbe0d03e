"""Nodes: loans stay inside where they must, and where they can."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_routings import REPRODUCIBLE, exact_quota, make_counts, routings

from megatron_llep.planner import Topology, make_plan

PLANNERS = ["tolerant", "exact", "lla"]


def count_crossing(plan, size):
    return int((plan.transfers[:, 1] // size != plan.transfers[:, 2] // size).sum())


@pytest.mark.parametrize("planner", PLANNERS)
@REPRODUCIBLE
@given(routing=routings(), nodes=st.integers(1, 8), across=st.booleans())
def test_every_plan_keeps_the_invariants_and_the_nodes(planner, routing, nodes, across):
    counts, max_foreign = routing
    P = len(counts)
    size = P // nodes if P % nodes == 0 else P
    plan = make_plan(
        counts,
        planner=planner,
        max_foreign=max_foreign,
        min_tokens_per_gemm=20,
        imbalance_threshold=0.0,
        topology=Topology(ranks_per_node=size, lend_across_nodes=across),
    )
    plan.validate(counts, max_foreign)
    if not across:
        assert count_crossing(plan, size) == 0


@REPRODUCIBLE
@given(routing=routings(), nodes=st.integers(1, 8))
def test_exact_balances_each_node_by_itself(routing, nodes):
    counts, _ = routing
    P, E = counts.shape
    size = P // nodes if P % nodes == 0 else P
    topology = Topology(ranks_per_node=size, lend_across_nodes=False)
    loads = counts.sum(axis=0)
    after = exact_quota(loads, P, E // P, topology).sum(axis=0).reshape(-1, size)
    total = loads.reshape(P // size, -1).sum(axis=1)
    extra = np.arange(size) < (total % size)[:, None]
    np.testing.assert_array_equal(after, (total // size)[:, None] + extra)


@REPRODUCIBLE
@given(routing=routings(), nodes=st.integers(2, 8), tolerance=st.sampled_from([0.0, 0.05, 0.3]))
def test_no_rank_has_more_than_on_one_node(routing, nodes, tolerance):
    """Whatever is lent for the links' sake, balance is that of `exact`, or within the tolerance."""
    counts, max_foreign = routing
    P, _ = counts.shape
    size = P // nodes if P % nodes == 0 else P
    options = {"max_foreign": max_foreign, "imbalance_threshold": 0.0}
    alone = make_plan(counts, planner="exact", **options)
    planner = "tolerant" if tolerance else "exact"
    topology = Topology(ranks_per_node=size)
    plan = make_plan(counts, planner=planner, tolerance=tolerance, topology=topology, **options)
    cap = max(-(-counts.sum() // P), int((1 + tolerance) * counts.sum() / P))
    assert plan.load_per_rank_after.max() <= max(cap, alone.load_per_rank_after.max())


@pytest.mark.parametrize("planner", PLANNERS)
def test_nodes_that_can_balance_themselves_do(planner):
    # Rank 0 of each of two nodes is hot by as much: no loan has to cross.
    counts = np.zeros((8, 16), dtype=np.int64)
    counts[0, [0, 8]] = 4000
    counts[1] = 10
    options = {"planner": planner, "imbalance_threshold": 0, "min_tokens_per_gemm": 1}
    plan = make_plan(counts, topology=Topology(ranks_per_node=4), **options)
    assert plan.imbalance_after <= 1.05
    assert len(plan.transfers) > 0
    assert count_crossing(plan, 4) == 0


@pytest.mark.parametrize("planner", ["lla"])
def test_fewer_loans_cross_when_nodes_are_known(planner):
    crossing = [0, 0]
    for seed in range(20):
        counts = make_counts("lognormal", P=16, M=8, seed=seed)
        for known in (False, True):
            topology = Topology(ranks_per_node=4 if known else None)
            plan = make_plan(
                counts,
                planner=planner,
                topology=topology,
                min_tokens_per_gemm=1,
                imbalance_threshold=0,
            )
            crossing[known] += count_crossing(plan, 4)
    assert crossing[True] < 0.9 * crossing[False]


def test_a_hot_node_sheds_within_the_tolerance_of_its_own_mean():
    # Node 0 has 90 of 100 tokens, all on rank 0: at best its two ranks have 45 each.
    counts = np.zeros((4, 4), dtype=np.int64)
    counts[0] = [90, 0, 6, 4]
    apart = Topology(ranks_per_node=2, lend_across_nodes=False)
    plan = make_plan(counts, planner="tolerant", tolerance=0.1, topology=apart)
    assert plan.load_per_rank_after.tolist() == [45, 45, 6, 4]
    assert len(plan.transfers) == 1


@pytest.mark.parametrize("ranks_per_node", [3, 5, 16])
def test_nodes_must_divide_the_ranks(ranks_per_node):
    counts = make_counts("lognormal", 8, 2, 0)
    with pytest.raises(ValueError, match=f"ranks_per_node={ranks_per_node} does not divide"):
        make_plan(counts, topology=Topology(ranks_per_node=ranks_per_node))


def test_a_node_has_a_rank():
    with pytest.raises(ValueError, match="ranks_per_node=0"):
        Topology(ranks_per_node=0)


def test_node_of():
    assert [Topology(ranks_per_node=2).node_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert Topology().node_of(7) == 0
