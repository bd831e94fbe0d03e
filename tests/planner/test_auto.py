"""Planner auto: never predicted to be slower than what it chooses from."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_routings import KINDS, REPRODUCIBLE, make_counts

from megatron_llep.planner import make_plan
from megatron_llep.planner.auto import TOLERANCES
from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.model import LayerCost, LayerShape
from megatron_llep.planner.cost.presets import PRESETS
from megatron_llep.planner.topology import ONE_NODE, Topology

SHAPE = LayerShape(hidden=2048, ffn_hidden=1024, num_experts=16, top_k=2)
COST = LayerCost(model=replace(PRESETS["h100"], planning_seconds=0.0), shape=SHAPE)
SKEWED = make_counts("lognormal", 8, 4, 0) * 16


def with_link(bytes_per_second: float) -> LayerCost:
    link = Link(latency_seconds=0.0, bytes_per_second=bytes_per_second)
    return LayerCost(model=replace(COST.model, intra_node=link, inter_node=link), shape=SHAPE)


@REPRODUCIBLE
@given(
    kind=st.sampled_from(KINDS),
    P=st.sampled_from([2, 4, 8]),
    M=st.integers(1, 6),
    per_node=st.sampled_from([None, 2]),
    times=st.sampled_from([1, 10, 100]),
    seed=st.integers(0, 9),
)
def test_the_least_predicted_time(kind, P, M, per_node, times, seed):
    counts = make_counts(kind, P, M, seed) * times
    topology = Topology(ranks_per_node=per_node)
    plan = make_plan(counts, planner="auto", cost=COST, topology=topology)
    plan.validate(counts, M)
    chosen = COST.predict(plan, counts, topology).total
    others = [{"planner": "exact", "max_foreign": 0}, {"planner": "exact"}]
    others += [{"planner": "tolerant", "tolerance": tolerance} for tolerance in TOLERANCES]
    others += [{"planner": "lla"}]
    others += [{"planner": each, "topology": ONE_NODE} for each in ("tolerant", "exact")]
    for options in others:
        told = {"topology": topology, "imbalance_threshold": 0.0, "cost": COST}
        other = make_plan(counts, **(told | options))
        assert chosen <= COST.predict(other, counts, topology).total


def test_the_link_decides():
    # Over a slow link a large expert takes longer than the tokens that stay on their rank save.
    large = replace(SHAPE, ffn_hidden=2**16)
    slow = replace(with_link(1e9), shape=large)
    assert make_plan(SKEWED, planner="auto", cost=slow).is_fallback
    fast = make_plan(SKEWED, planner="auto", cost=with_link(1e15))
    assert fast.imbalance_after < 1.01


def test_the_paper_s_numbers_have_no_say():
    plan = make_plan(SKEWED, planner="auto", cost=with_link(1e15))
    same = make_plan(
        SKEWED,
        planner="auto",
        cost=with_link(1e15),
        imbalance_threshold=100.0,
        capacity_factor=5.0,
        min_tokens_per_gemm=10**9,
    )
    assert np.array_equal(plan.quota, same.quota)


def test_slots_bound_the_plan():
    plan = make_plan(SKEWED, planner="auto", cost=with_link(1e15), max_foreign=1)
    assert plan.max_foreign == 1
    assert make_plan(SKEWED, planner="auto", cost=with_link(1e15), max_foreign=0).is_fallback


def test_a_gain_below_the_cost_of_planning_is_left():
    cost = with_link(1e15)
    plain = make_plan(SKEWED, planner="exact", max_foreign=0)
    seconds = cost.predict(plain, SKEWED, ONE_NODE).total
    dear = LayerCost(model=replace(cost.model, planning_seconds=seconds), shape=SHAPE)
    assert make_plan(SKEWED, planner="auto", cost=dear).is_fallback


def test_it_needs_a_cost_model():
    with pytest.raises(ValueError, match="cost="):
        make_plan(SKEWED, planner="auto")
