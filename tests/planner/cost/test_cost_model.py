"""The cost model: what it adds up, what it counts as traffic, its file.

Shape letters: P ranks, E experts, M = E / P.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.planner import make_plan, receives, sends
from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.model import EXCHANGES, CostModel, LayerShape
from megatron_llep.planner.cost.presets import PRESETS, get_cost_model
from megatron_llep.planner.cost.traffic import count_lending, count_tokens
from megatron_llep.planner.plan import plan_from_quota
from megatron_llep.planner.topology import ONE_NODE, Topology
from planner.planner_routings import KINDS, REPRODUCIBLE, make_counts

SHAPE = LayerShape(hidden=8, ffn_hidden=16, num_experts=4, top_k=1)
# Round numbers, and nothing hidden.
MODEL = CostModel(
    machine="made up",
    flops_per_second=1e6,
    half_rate_tokens=10.0,
    gemm_overhead_seconds=0.5,
    backward_factor=2.0,
    copy_bytes_per_second=1e3,
    intra_node=Link(latency_seconds=0.25, bytes_per_second=1e2),
    inter_node=Link(latency_seconds=1.0, bytes_per_second=1e1),
    overlap=0.0,
    planning_seconds=7.0,
)
# Rank 0 has 30 tokens for expert 0 and 10 for expert 2; rank 1 has 20 for expert 0.
COUNTS = np.array([[30, 0, 10, 0], [20, 0, 0, 0]])


def test_plain_expert_parallelism_by_hand():
    plan = make_plan(COUNTS, planner="exact", max_foreign=0)
    time = MODEL.predict_layer(plan, COUNTS, SHAPE, ONE_NODE)
    flops = 2 * 3 * 8 * 16
    # Rank 0: 50 tokens of one expert; three times for backward.
    assert time.compute == pytest.approx(3 * (flops * (50 + 10) / 1e6 + 0.5))
    # Rank 0 copies 40 tokens out and 50 in, receives 20 and sends 10, of 16 bytes.
    assert time.exchange == pytest.approx(EXCHANGES * (90 * 16 / 1e3 + 20 * 16 / 1e2 + 0.25))
    assert (time.lending, time.returning, time.planning) == (0, 0, 0)
    assert time.total == time.compute + time.exchange


def test_lending_by_hand():
    quota = np.array([[30, 20], [0, 0], [0, 10], [0, 0]])
    plan = plan_from_quota(quota)
    time = MODEL.predict_layer(plan, COUNTS, SHAPE, ONE_NODE)
    weights = 3 * 8 * 16
    # Copied and sent by rank 0, then copied by rank 1. Weights have 2 bytes, gradients 4.
    assert time.lending == pytest.approx(2 * weights * (2 / 1e3 + 1 / 1e2) + 0.25)
    assert time.returning == pytest.approx(4 * weights * (2 / 1e3 + 1 / 1e2) + 0.25)
    assert time.planning == 7.0
    # Rank 1 keeps its own 20, and receives 10 of rank 0's; it copies 20 out and 30 in, rank 0 70.
    assert time.exchange == pytest.approx(EXCHANGES * (70 * 16 / 1e3 + 10 * 16 / 1e2 + 0.25))
    refetched = MODEL.predict_layer(plan, COUNTS, replace(SHAPE, refetch=True), ONE_NODE)
    assert refetched.lending == pytest.approx(2 * time.lending)


def test_forward_only_by_hand():
    plan = plan_from_quota(np.array([[30, 20], [0, 0], [0, 10], [0, 0]]))
    both = MODEL.predict_layer(plan, COUNTS, SHAPE, ONE_NODE)
    refetch = replace(SHAPE, refetch=True)
    for shape in (SHAPE, refetch):
        time = MODEL.predict_layer(plan, COUNTS, shape, ONE_NODE, forward_only=True)
        assert time.compute == pytest.approx(both.compute / 3)
        assert time.exchange == pytest.approx(both.exchange / 2)
        assert (time.lending, time.returning, time.planning) == (both.lending, 0, both.planning)


def test_rank_order_by_hand():
    # Three ranks have 30 tokens each for expert 0. In rank order those of rank 0 and 15 of rank 1
    # fill rank 0; 15 of rank 1 and 10 of rank 2 fill rank 1; 20 of rank 2 stay.
    counts = np.array([[30, 0, 0], [30, 0, 0], [30, 0, 0]])
    plan = plan_from_quota(np.array([[45, 25, 20], [0, 0, 0], [0, 0, 0]]))
    ranked = count_tokens(plan, counts, ONE_NODE, "rank_order")
    assert ranked.tolist() == [[[0, 15, 10], [15, 10, 0]]]
    # On two nodes, of ranks 0 and 1, and 2 and 3, whose 30 are the last ones for rank 2.
    counts, quota = np.zeros((2, 4, 4), dtype=int)
    counts[:, 0], quota[0] = [30, 30, 30, 30], [45, 25, 50, 0]
    ranked = count_tokens(plan_from_quota(quota), counts, Topology(ranks_per_node=2), "rank_order")
    assert ranked.tolist() == [[[0, 15, 0, 30], [15, 0, 30, 0]], [[0, 0, 10, 0], [0, 10, 0, 0]]]
    with pytest.raises(ValueError, match="by_name"):
        count_tokens(plan, counts[:3, :3], ONE_NODE, "by_name")
    # It is what the exchange of the layer's prediction is made of: 15 received by rank 0, whose
    # copies are the most, 30 out and 45 in.
    order = {"forward_only": True, "order": "rank_order"}
    time = MODEL.predict_layer(plan, np.array([[30, 0, 0]] * 3), SHAPE, ONE_NODE, **order)
    assert time.exchange == pytest.approx(2 * (75 * 16 / 1e3 + 15 * 16 / 1e2 + 0.25))


def test_what_is_hidden():
    # Rank 0 lends to rank 1 while it receives rank 1's tokens: opposite ways.
    counts = np.array([[0, 0, 0, 0], [60, 0, 0, 0]])
    plan = plan_from_quota(np.array([[30, 30], [0, 0], [0, 0], [0, 0]]))
    shown = MODEL.predict_layer(plan, counts, SHAPE, ONE_NODE)
    hidden = replace(MODEL, overlap=1.0).predict_layer(plan, counts, SHAPE, ONE_NODE)
    half = replace(MODEL, overlap=0.5).predict_layer(plan, counts, SHAPE, ONE_NODE)
    tokens, weights = 30 * 16 / 1e2, 2 * 3 * 8 * 16 / 1e2
    assert shown.lending - hidden.lending == pytest.approx(min(tokens, weights))
    assert half.lending == pytest.approx((shown.lending + hidden.lending) / 2)
    # The same way as the tokens: nothing is saved.
    counts = np.array([[60, 0, 10, 0], [0, 0, 0, 0]])
    args = plan_from_quota(np.array([[30, 30], [0, 0], [0, 10], [0, 0]])), counts, SHAPE, ONE_NODE
    fast = replace(MODEL, overlap=1.0).predict_layer(*args).lending
    assert fast == pytest.approx(MODEL.predict_layer(*args).lending)


def test_other_nodes_are_slower():
    plan = plan_from_quota(np.array([[30, 20], [0, 0], [0, 10], [0, 0]]))
    near = MODEL.predict_layer(plan, COUNTS, SHAPE, ONE_NODE)
    far = MODEL.predict_layer(plan, COUNTS, SHAPE, Topology(ranks_per_node=1))
    assert far.compute == near.compute
    assert far.exchange == pytest.approx(EXCHANGES * (70 * 16 / 1e3 + 10 * 16 / 1e1 + 1.0))
    assert far.lending == pytest.approx(2 * 384 * (2 / 1e3 + 1 / 1e1) + 1.0)


@REPRODUCIBLE
@given(
    kind=st.sampled_from(KINDS),
    nodes=st.sampled_from([1, 2, 4]),
    per_node=st.sampled_from([1, 2, 3]),
    M=st.integers(1, 5),
    planner=st.sampled_from(["exact", "lla"]),
    seed=st.integers(0, 9),
)
def test_traffic_is_what_the_ranks_send(kind, nodes, per_node, M, planner, seed):
    P = nodes * per_node
    counts = make_counts(kind, P, M, seed)
    topology = Topology(ranks_per_node=per_node)
    options = {"imbalance_threshold": 0.0, "min_tokens_per_gemm": 0}
    plan = make_plan(counts, planner=planner, topology=topology, **options)
    traffic = count_tokens(plan, counts, topology)
    sent = [sends(plan, counts, r, topology=topology).sum(axis=0) for r in range(P)]
    matrix = np.stack(sent)  # [P, P]
    np.fill_diagonal(matrix, 0)
    tokens = traffic.sum(axis=0)
    lent = sum(each.numbers for each in count_lending(plan, 10, 0, topology))
    assert np.allclose(tokens[0], matrix.sum(axis=1))
    assert np.allclose(tokens[1], matrix.sum(axis=0))
    received = [receives(plan, counts, r, topology=topology) for r in range(P)]
    assert np.allclose(tokens[1], [part.sum() - part[r].sum() for r, part in enumerate(received)])
    expert, home, borrower = plan.transfers.T
    assert np.array_equal(lent[:, 1].sum(axis=0), 10 * np.bincount(borrower, minlength=P))
    if nodes > 1:
        node = np.arange(P) // per_node
        together = node[:, None] == node
        assert np.isclose(traffic[0, 0].sum(), matrix[together].sum())
        assert np.isclose(traffic[1, 1].sum(), matrix[~together].sum())
        is_far = node[home] != node[borrower]
        crossings = set(zip(expert[is_far].tolist(), node[borrower[is_far]].tolist(), strict=True))
        assert lent[1, 0].sum() == 10 * len(crossings)


def test_break_even_of_the_design():
    # FLOP rate / bandwidth, and a third more with the weights fetched twice.
    model = PRESETS["h100"]
    for link, tokens in ((model.intra_node, 600e12 / 450e9), (model.inter_node, 600e12 / 50e9)):
        for hidden in (1024, 8192):
            shape = LayerShape(hidden=hidden, ffn_hidden=2048, num_experts=8, top_k=1)
            assert model.break_even_tokens(shape, link) == pytest.approx(tokens)
            refetch = replace(shape, refetch=True)
            assert model.break_even_tokens(refetch, link) == pytest.approx(tokens * 4 / 3)


def test_the_file_keeps_every_number(tmp_path):
    path = tmp_path / "cost.json"
    MODEL.save(path)
    assert CostModel.load(path) == MODEL
    assert get_cost_model(str(path)).digest() == MODEL.digest()
    assert replace(MODEL, overlap=0.1).digest() != MODEL.digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "not a cost model"),
        ("[]", "not a cost model"),
        ('{"machine": "x"}', "not a cost model"),
    ],
)
def test_files_that_are_no_cost_model(tmp_path, text, message):
    path = tmp_path / "cost.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        get_cost_model(str(path))
    assert str(path) in str(error.value)
    assert "megatron_llep calibrate" in str(error.value)
    assert "h100, h200" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"flops_per_second": 0.0},
        {"overlap": 1.5},
        {"planning_seconds": -1.0},
        {"half_rate_tokens": float("nan")},
        {"inter_node": Link(latency_seconds=0.0, bytes_per_second=0.0)},
    ],
)
def test_numbers_that_describe_no_machine(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(MODEL, **change)
