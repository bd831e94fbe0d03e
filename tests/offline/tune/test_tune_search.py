"""What settings are tried, and that the best of them is found."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tune_runs import H200, SHAPE, E, K, P, route

from megatron_llep.config import LLEPConfig
from megatron_llep.offline.nodes import find_nodes
from megatron_llep.offline.tune import Replayer, Sample, choose, list_nodes, make_grid, search
from megatron_llep.offline.tune.settings import keep_settings
from megatron_llep.planner import make_plan
from megatron_llep.planner.cost.model import LayerCost
from megatron_llep.planner.topology import ONE_NODE, Topology

COST = LayerCost(model=H200, shape=SHAPE)
TWO_NODES = Topology(ranks_per_node=2)


def make_settings(ranks_per_node=None, ranks_per_host=None, **options):
    """On nodes of so many ranks, of which training finds `ranks_per_host`."""
    nodes = list_nodes(find_nodes(ranks_per_node, P), ranks_per_host)
    sizes = {"experts_per_rank": E // P, "mean_load": 16384, "machine": "h200"}
    return make_grid(LLEPConfig(), **(sizes | {"nodes": nodes} | options))


def make_run(workloads, *, batches=4, tokens=8192):
    counts, batch = [], []
    for number in range(batches):
        for layer, workload in enumerate(workloads):
            counts.append(route(workload, layer=layer, step=number, tokens=tokens))
            batch.append(number)
    return Sample(
        counts=counts,
        batch=np.array(batch),
        batches_of_run=batches,
        top_k=K,
        moe_layers=len(workloads),
    )


def tune(sample, grid=None, topology=ONE_NODE, cost=COST, **options):
    replayer = Replayer(sample.counts, cost, topology)
    scored = search(replayer, grid or make_settings(), **options)
    return choose(scored, replayer, sample, cost), scored


def predict(counts, setting, topology=ONE_NODE, told=ONE_NODE):
    """Directly, as training plans."""
    plan = make_plan(
        counts,
        planner=setting.planner,
        max_foreign=setting.max_foreign_experts,
        capacity_factor=setting.capacity_factor,
        min_tokens_per_gemm=setting.min_tokens_per_gemm,
        imbalance_threshold=setting.imbalance_threshold,
        tolerance=setting.tolerance,
        topology=told,
        cost=COST,
    )
    return plan, H200.predict_layer(plan, counts, SHAPE, topology).total


@given(
    workload=st.sampled_from(["balanced", "lognormal-1", "hot-30-4", "hot-95-1", "zipf", "ragged"]),
    tokens=st.integers(0, 20000),
    ranks_per_host=st.sampled_from([None, 1, 2, P]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_a_replay_is_what_training_would_plan(workload, tokens, ranks_per_host, data):
    """Which finds nodes by hostnames where it is not told; whatever they really are."""
    setting = data.draw(st.sampled_from(make_settings(2, ranks_per_host)))
    counts = route(workload, tokens=tokens)
    replayer = Replayer([counts], COST, TWO_NODES, found=Topology(ranks_per_node=ranks_per_host))
    told = Topology(
        ranks_per_node=setting.ranks_per_node or ranks_per_host,
        lend_across_nodes=setting.lend_to == "any_node",
    )
    plan, seconds = predict(counts, setting, TWO_NODES, told)
    found = replayer.run(setting)
    assert found.seconds.tolist() == [seconds]
    assert found.foreign.tolist() == [plan.max_foreign]
    assert found.lent.tolist() == [len(plan.transfers)]


@pytest.mark.parametrize("planner", ["tolerant", "exact"])
def test_between_nodes_a_loan_may_pay_where_loads_are_even(planner):
    """By default; a threshold that is given holds."""
    counts = np.zeros((P, E), np.int64)
    for home in range(P):
        counts[(home + 2) % P, home * E // P : (home + 1) * E // P] = 20_000  # from the other node
    replayer = Replayer([counts], COST, TWO_NODES)
    setting = LLEPConfig(planner=planner)
    plan, seconds = predict(counts, setting, TWO_NODES, TWO_NODES)
    assert len(plan.transfers) > 0
    found = replayer.run(setting)
    assert (found.lent.tolist(), found.seconds.tolist()) == ([len(plan.transfers)], [seconds])
    assert replayer.run(replace(setting, imbalance_threshold=1.2)).lent.tolist() == [0]


def test_halving_finds_the_best_of_all():
    sample = make_run(["lognormal-1", "hot-30-4", "balanced", "zipf"], batches=30)
    halved, few = tune(sample)
    full, every = tune(sample, stages=(1,))
    assert len(every) == len(make_settings())
    assert len(few) < len(every) / 2
    assert halved.best.setting == full.best.setting
    assert halved.best.seconds == full.best.seconds
    for one, other in zip(halved.by_planner, full.by_planner, strict=True):
        assert one.seconds == pytest.approx(other.seconds, rel=0.01)


@pytest.mark.parametrize("workload", ["balanced", "lognormal-1", "hot-80-4", "hot-95-1"])
def test_nothing_is_better_than_the_best(workload):
    choice, scored = tune(make_run([workload]))
    others = [*([choice.runner_up] if choice.runner_up else []), *choice.by_planner]
    assert all(choice.best.seconds <= each.seconds for each in others)
    totals = [each.total for each in scored]
    assert min(totals) == pytest.approx(totals[0])
    assert {choice.best.setting.planner, *(each.setting.planner for each in choice.by_planner)} == {
        "tolerant",
        "exact",
        "lla",
        "auto",
    }


def test_the_same_again():
    sample = make_run(["lognormal-1", "zipf"], batches=10)
    one, other = tune(sample)[0], tune(sample)[0]
    assert one.best.setting == other.best.setting
    assert one.best.seconds == other.best.seconds
    assert one.runner_up.setting == other.runner_up.setting


def test_more_skew_is_more_gain_and_a_tighter_bound_is_less():
    gains = []
    for workload in ("balanced", "hot-30-4", "hot-50-4", "hot-80-4"):
        choice, _ = tune(make_run([workload]))
        gains.append(choice.plain_seconds / choice.best.seconds)
    assert gains == sorted(gains)
    assert gains[0] == 1
    assert gains[-1] > 1.5
    sample = make_run(["lognormal-2", "hot-50-4"])
    bound = [tune(sample, make_settings(max_foreign=n))[0].best for n in (1, 2, 4)]
    assert [each.seconds for each in bound] == sorted((e.seconds for e in bound), reverse=True)
    assert all(each.foreign <= n for each, n in zip(bound, (1, 2, 4), strict=True))


def test_slow_links_between_nodes_are_lent_over_less():
    slow = replace(H200, inter_node=replace(H200.inter_node, bytes_per_second=1e8))
    cost = LayerCost(model=slow, shape=SHAPE)
    sample = make_run(["lognormal-2"])
    grid = make_settings(2, ranks_per_host=2)
    choice, scored = tune(sample, grid, TWO_NODES, cost)
    assert choice.best.setting.ranks_per_node is None, "they are found"
    as_one = min(s.total for s in scored if s.setting.ranks_per_node == P)
    assert scored[0].total < as_one


def test_the_grid_keeps_to_its_bounds():
    grid = make_settings()
    assert len(set(grid)) == len(grid)
    assert {s.max_foreign_experts for s in grid} == {None, 1, 2}
    assert {s.max_foreign_experts for s in make_settings(max_foreign=3)} == {1, 2, 3}
    assert all(
        s.min_tokens_per_gemm < 100 for s in make_settings(mean_load=100) if s.planner == "lla"
    )
    with pytest.raises(ValueError, match="--max-foreign 0"):
        make_settings(max_foreign=0)


@pytest.mark.parametrize(
    ("really", "found", "told"),
    [
        (P, None, {(None, "any_node")}),
        (P, P, {(None, "any_node")}),
        (P, 2, {(P, "any_node")}),
        (2, 2, {(None, "any_node"), (None, "own_node"), (P, "any_node")}),
        (2, None, {(2, "any_node"), (2, "own_node"), (P, "any_node")}),
        (2, P, {(2, "any_node"), (2, "own_node"), (None, "any_node")}),
        (2, 1, {(2, "any_node"), (2, "own_node"), (P, "any_node")}),
    ],
)
def test_what_training_finds_is_not_told(really, found, told):
    """Of four ranks; else what is really so, lending inside nodes, and all as one node."""
    grid = make_settings(really, found)
    assert {(s.ranks_per_node, s.lend_to) for s in grid} == told


def test_what_is_not_tuned_is_kept():
    base = keep_settings({"grad_dtype": "param", "planner": "lla", "tolerance": 0.5})
    assert base == LLEPConfig(grad_dtype="param")
    with pytest.raises(ValueError, match="replicas"):
        keep_settings({"replicas": "expert-dp"})


def test_some_slower_micro_batches_are_told():
    # Few tokens: planning and latency cost more than balance saves, unless it is left to auto.
    sample = make_run(["hot-95-1"], tokens=16)
    grid = [s for s in make_settings() if s.planner == "exact" and s.imbalance_threshold is None]
    choice, _ = tune(sample, grid)
    assert choice.best.slower == 1
    assert not choice.switch_on
    assert len(choice.reasons) == 3
    assert choice.best.gains.max() < 1


def test_memory_of_foreign_experts():
    sample = make_run(["hot-80-4", "balanced"], batches=2)
    grid = [s for s in make_settings() if s.planner == "exact" and s.imbalance_threshold is None]
    for refetch in (False, True):
        cost = LayerCost(model=H200, shape=replace(SHAPE, refetch=refetch))
        best = tune(sample, grid[:1], cost=cost)[0].best
        assert best.foreign == 1
        # The balanced layer borrows nothing: kept or fetched again, weights of one layer.
        assert best.foreign_bytes == SHAPE.expert_bytes + SHAPE.gradient_bytes
    sample = make_run(["hot-80-4", "hot-80-4"], batches=2)
    kept = tune(sample, grid[:1])[0].best
    assert kept.foreign_bytes == 2 * SHAPE.expert_bytes + SHAPE.gradient_bytes
