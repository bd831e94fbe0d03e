"""Links: the burst, the way back, and what is left of them in whole layers and in files.

Shape letters: P ranks, L links.
"""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.planner.cost.link import Link, join_ways, time_links, time_starts
from megatron_llep.planner.cost.model import EXCHANGES, CostModel
from megatron_llep.planner.plan import plan_from_quota
from megatron_llep.planner.topology import ONE_NODE
from planner.cost.test_cost_model import COUNTS, MODEL, SHAPE

# 100 bytes a second; the first 50 bytes of a transfer in half the time.
LINK = Link(
    latency_seconds=0.25,
    bytes_per_second=1e2,
    burst_bytes=50.0,
    burst_cost=0.5,
    opposite_cost=0.25,
)
SECOND = 10**12


def test_the_burst_by_hand():
    things = np.array([0, 4, 5, 20])
    assert LINK.time_bytes(things, 10).tolist() == [
        0,
        SECOND * 2 // 10,
        SECOND * 5 // 20,
        SECOND * 175 // 100,
    ]


def test_both_ways_by_hand():
    # Of three ranks one sends more than it receives, one less, one both alike.
    ways = np.array([[8, 2, 4], [4, 6, 4]]) * SECOND
    assert LINK.join_ways(ways).tolist() == [9 * SECOND, 13 * SECOND // 2, 5 * SECOND]
    assert replace(LINK, opposite_cost=0.0).join_ways(ways).tolist() == ways.max(axis=0).tolist()
    assert replace(LINK, opposite_cost=1.0).join_ways(ways).tolist() == ways.sum(axis=0).tolist()


def test_links_work_side_by_side():
    slow = replace(LINK, bytes_per_second=10.0, opposite_cost=0.0, latency_seconds=1.0)
    things = np.array([[[30, 5], [30, 5]], [[1, 6], [1, 0]]])  # [L, 2, P]
    times = time_links((LINK, slow), things, 10)
    assert times.tolist() == [
        LINK.time_bytes(things[0], 10).tolist(),
        slow.time_bytes(things[1], 10).tolist(),
    ]
    near = int(LINK.join_ways(times[0, :, :1])[0])
    assert join_ways((LINK, slow), times).tolist() == [near, int(times[1].max())]
    assert time_starts((LINK, slow), things > 0) == SECOND
    # With one node the other link is not asked.
    assert time_starts((LINK, slow), things[:1]) == round(30 * 0.25 * SECOND)


def test_a_layer_on_such_links():
    plan = plan_from_quota(np.array([[30, 20], [0, 0], [0, 10], [0, 0]]))
    burst = replace(LINK, opposite_cost=0.0)
    plain = MODEL.predict_layer(plan, COUNTS, SHAPE, ONE_NODE)
    time = replace(MODEL, intra_node=burst).predict_layer(plan, COUNTS, SHAPE, ONE_NODE)
    # Of each exchange 50 bytes go in half the time.
    assert plain.exchange - time.exchange == pytest.approx(EXCHANGES * 0.25)
    assert plain.lending - time.lending == pytest.approx(0.25)
    assert plain.returning - time.returning == pytest.approx(0.25)
    # Rank 0 lends expert 0, rank 1 expert 2: each sends one and receives one.
    plan = plan_from_quota(np.array([[30, 20], [0, 0], [5, 5], [0, 0]]))
    duplex = MODEL.predict_layer(plan, COUNTS, SHAPE, ONE_NODE)
    half = replace(LINK, burst_bytes=0.0, opposite_cost=1.0)
    time = replace(MODEL, intra_node=half).predict_layer(plan, COUNTS, SHAPE, ONE_NODE)
    assert time.lending - duplex.lending == pytest.approx(2 * 384 / 1e2)


@given(
    one=st.integers(0, 10**9),
    other=st.integers(0, 10**9),
    burst=st.floats(0, 1e9),
    cost=st.floats(0, 1),
    opposite=st.floats(0, 1),
)
def test_more_bytes_never_take_less(one, other, burst, cost, opposite):
    link = Link(
        latency_seconds=0.0,
        bytes_per_second=1e9,
        burst_bytes=burst,
        burst_cost=cost,
        opposite_cost=opposite,
    )
    few, many = sorted((one, other))
    less, more, both = link.time_bytes(np.array([few, many, few + many]), 1).tolist()
    assert less <= more <= both
    assert both >= less + more - 1  # picoseconds; a transfer that is cut has two bursts
    joined = int(link.join_ways(np.array([less, more])))
    assert more <= joined <= less + more


def test_files_from_before_are_read_as_they_were(tmp_path):
    path = tmp_path / "cost.json"
    values = asdict(MODEL)
    for name in ("intra_node", "inter_node"):
        values[name] = {k: values[name][k] for k in ("latency_seconds", "bytes_per_second")}
    path.write_text(json.dumps(values))
    assert CostModel.load(path) == MODEL
    model = replace(MODEL, inter_node=LINK)
    model.save(path)
    assert CostModel.load(path) == model


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("burst_bytes", -1.0),
        ("burst_cost", float("inf")),
        ("burst_cost", 1.5),
        ("opposite_cost", 1.5),
    ],
)
def test_numbers_that_describe_no_link(name, value):
    with pytest.raises(ValueError, match=f"inter_node.{name}={value}"):
        replace(MODEL, inter_node=replace(LINK, **{name: value}))
