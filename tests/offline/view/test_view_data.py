"""What a page has been given: against the recording itself, by other means."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from view_recordings import (
    HOT_BATCH,
    HOT_EXPERT,
    HOT_LAYER,
    HOT_STEP,
    LAYERS,
    MODEL,
    STEPS,
    E,
    P,
    hot_counts,
    make_info,
    make_random_rows,
    make_row,
    write_planted,
    write_rows,
)

from megatron_llep.offline.methods import METHODS, check_methods, plan_method
from megatron_llep.offline.nodes import find_nodes
from megatron_llep.offline.recording import Recording
from megatron_llep.offline.view.build import Options, build_view, default_max_cells
from megatron_llep.offline.view.columns import Columns
from megatron_llep.offline.view.details import TOP_EXPERTS
from megatron_llep.offline.view.drift import SHOWN_EXPERTS, choose_experts, encode_drift
from megatron_llep.offline.view.times import choose_rows
from megatron_llep.planner import Topology, make_plan
from megatron_llep.planner.cost.across import count_node_bytes
from megatron_llep.planner.cost.model import LayerCost, LayerShape
from megatron_llep.planner.cost.presets import PRESETS

COST = PRESETS["h200"]


def build(folder, **options):
    return build_view(Recording.open(folder), Options(cost=COST, **options))


@given(steps=st.lists(st.integers(0, 10_000), min_size=1, unique=True), most=st.integers(1, 50))
def test_columns_split_all_steps_evenly(steps, most):
    steps = np.sort(np.array(steps))
    columns = Columns.split(steps, most)
    assert len(columns) == min(most, len(steps))
    found = columns.find(steps)
    sizes = np.bincount(found, minlength=len(columns))
    assert sizes.max() - sizes.min() <= 1
    for column in range(len(columns)):
        of_column = steps[found == column]
        assert (of_column[0], of_column[-1]) == (columns.first[column], columns.last[column])


def test_cells_are_means_and_extremes_of_their_rows(tmp_path):
    rows = make_random_rows(steps=6)
    view = build(write_rows(tmp_path, rows), max_cells=6)  # 3 columns of 2 steps
    assert view["columns"] == {"first": [0, 2, 4], "last": [1, 3, 5]}
    for at in range(6):
        layer, column = LAYERS[at // 3], at % 3
        plans = [r.plan for r in rows if r.layer == layer and r.step // 2 == column]
        before = [plan.imbalance_before for plan in plans]
        after = [plan.imbalance_after for plan in plans]
        cells = {name: values[at] for name, values in view["cells"].items()}
        assert cells["rows"] == len(plans) == 8
        assert cells["meanBefore"] == pytest.approx(np.mean(before), abs=1e-3)
        assert cells["worstBefore"] == pytest.approx(max(before), abs=1e-3)
        assert cells["meanAfter"] == pytest.approx(np.mean(after), abs=1e-3)
        assert cells["worstAfter"] == pytest.approx(max(after), abs=1e-3)


def test_details_are_of_the_worst_micro_batch(tmp_path):
    rows = make_random_rows(steps=5)
    view = build(write_rows(tmp_path, rows), max_cells=4)
    assert view["methods"] == ["recorded", "tolerant", "exact", "lla", "auto"]
    cost = LayerCost(model=COST, shape=LayerShape(**MODEL, num_experts=E, top_k=2))
    for at, detail in enumerate(view["details"]):
        step, micro_batch, group, before, top, uses, lists = detail
        layer, column = LAYERS[at // 2], at % 2
        of_cell = [r for r in rows if r.layer == layer and (r.step >= 3) == column]
        worst = max(of_cell, key=lambda r: r.plan.imbalance_before)
        assert (step, micro_batch, group) == (worst.step, worst.micro_batch, worst.group)
        assert before == worst.plan.load_per_rank_before.tolist()
        loads = worst.counts.sum(axis=0)
        assert dict(zip(top[::2], top[1::2], strict=True)) == {
            e: loads[e] for e in np.argsort(-loads, kind="stable")[:TOP_EXPERTS] if loads[e]
        }
        for method, use in zip(view["methods"], uses, strict=True):
            plan = worst.plan
            if method != "recorded":
                plan = plan_method(worst.counts, method, Topology(), cost)
            expected = {(e, b): plan.quota[e, b] for e, _, b in plan.transfers.tolist()}
            found = np.array(lists[use]).reshape(-1, 3).tolist()
            assert {(e, b): pairs for e, b, pairs in found} == expected
        assert len(lists) == len({tuple(flat) for flat in lists})


def test_a_cell_without_rows_is_empty(tmp_path):
    rows = [row for row in make_random_rows(steps=4) if row.layer == 1 or row.step > 1]
    view = build(write_rows(tmp_path, rows))
    assert view["cells"]["rows"] == [4, 4, 4, 4, 0, 0, 4, 4]
    assert [detail is None for detail in view["details"]] == [False] * 4 + [True, True] + [
        False
    ] * 2


def test_the_order_of_writing_does_not_matter(tmp_path):
    rows = make_random_rows(steps=4)
    rows += [make_row(rows[0].counts, step=2, layer=1, micro_batch=5)]  # as bad as another
    views = [
        build(write_rows(tmp_path / name / "run", of_run), max_cells=4)
        for name, of_run in (("a", rows), ("b", rows[::-1]))
    ]
    assert views[0] == views[1]


def test_what_a_run_observed_is_planned(tmp_path):
    view = build(write_planted(tmp_path / "run", planner="observe"))
    assert view["recorded"] is None
    assert view["methods"] == ["tolerant", "exact", "lla", "auto"]
    assert "worstAfter" not in view["cells"]
    assert f"layer {HOT_LAYER} at step {HOT_STEP}" in view["summary"]
    plan = make_plan(hot_counts())
    assert f"{plan.imbalance_before:.2f} x" in view["summary"]
    assert f"tolerant would make it {plan.imbalance_after:.2f} x" in view["summary"]


def test_times_are_those_of_the_cost_model(tmp_path):
    rows = make_random_rows(steps=3)
    rest = {"other_flops_per_token": 3e6}
    folder = write_rows(tmp_path, rows, make_info(model=MODEL | rest))
    times = build(folder)["times"]
    shape = LayerShape(**MODEL, num_experts=E, top_k=2)
    cost = LayerCost(model=COST, shape=shape)
    assert times["steps"] == [0, 1, 2]
    assert times["whole"] is True
    assert times["rows"] == len(rows)
    assert list(times["lines"]) == ["plain", "recorded", "tolerant", "exact", "lla", "auto"]
    for method, line in times["lines"].items():
        for step, microseconds in enumerate(line):
            seconds = 0.0
            for row in (r for r in rows if r.step == step):
                plan = row.plan
                if method != "recorded":
                    plan = plan_method(row.counts, method, Topology(), cost)
                seconds += cost.predict(plan, row.counts, Topology()).total
                tokens = row.counts.sum(axis=1).max() / 2
                other = tokens * 3e6 / COST.flops_per_second * (1 + COST.backward_factor)
                seconds += other / len(LAYERS)
            assert microseconds == pytest.approx(seconds / 2 * 1e6, abs=1)  # of two groups


def test_what_crosses_between_nodes_is_counted(tmp_path):
    rows = make_random_rows(steps=3)
    folder = write_rows(tmp_path / "run", rows, make_info(ranks_per_host=2))
    view, nodes = build(folder), Topology(ranks_per_node=2)
    cost = LayerCost(model=COST, shape=LayerShape(**MODEL, num_experts=E, top_k=2))
    across = view["times"]["across"]
    assert list(across) == list(view["times"]["lines"])
    for method, found in across.items():
        sent = [
            count_node_bytes(
                row.plan if method == "recorded" else plan_method(row.counts, method, nodes, cost),
                row.counts,
                cost.shape,
                nodes,
            )
            for row in rows
        ]
        expected = np.mean([(each.total, each.busiest) for each in sent], axis=0)
        assert found == pytest.approx(expected.tolist(), abs=1)
    total, busiest = across["plain"]
    facts = dict(view["facts"])
    assert f"plain EP {total / 1e6:.3g} ({busiest / 1e6:.3g})" in facts["Across nodes"]
    one = build(folder, nodes=find_nodes(4, P))
    assert one["times"]["across"] == {}
    assert "Across nodes" not in dict(one["facts"])


def test_without_sizes_nothing_is_predicted(tmp_path):
    view = build(write_planted(tmp_path / "run", model={}))
    assert view["times"] is None
    assert "auto" not in view["methods"]
    assert any("--model" in value for _, value in view["facts"])
    shape = LayerShape(**MODEL, num_experts=E, top_k=2)
    view = build(tmp_path / "run", shape=shape, shape_from="elsewhere")
    assert view["times"] is not None
    assert any("elsewhere" in value for _, value in view["facts"])


def test_the_sample_is_bounded_even_and_of_whole_micro_batches(tmp_path):
    rows = make_random_rows(steps=20, batches=3, groups=2)
    rows = [r for r in rows if not (r.step == 19 and r.layer == 3)]  # was killed there
    recording = Recording.open(write_rows(tmp_path, rows))
    sample = choose_rows(recording, 5, 40)
    assert sample.steps.tolist() == [0, 5, 10, 14]  # the last one is not whole
    assert len(sample.rows) <= 40
    places = recording.places[sample.rows]
    for step in sample.steps:
        of_step = places[places[:, 0] == step]
        batches = {tuple(place) for place in of_step[:, [1, 3]].tolist()}
        assert len(of_step) == len(LAYERS) * len(batches)
        assert sample.batches[step] == 3 / len(batches)


def test_drift_follows_the_hot_experts():
    loads = np.ones((1, 4, 40), np.int64)
    loads[0, :2, 5] = 41
    loads[0, 2:, 33] = 41
    drift = encode_drift(loads, Columns.split(np.arange(4), 4))
    (experts,), (load,), (change,) = drift["experts"], drift["load"], drift["change"]
    assert len(experts) == SHOWN_EXPERTS
    assert {5, 33} <= set(experts)
    table = np.array(load).reshape(SHOWN_EXPERTS, 4)
    assert table[experts.index(5)].tolist() == [2050, 2050, 50, 50]
    assert table[experts.index(33)].tolist() == [50, 50, 2050, 2050]
    assert change == [0, 500, 0]  # 40 of 80 went from one to the other


def test_who_was_hottest_once_is_shown_before_the_second_of_another_time():
    share = np.full((2, 50), 0.001)
    share[0, :30] = np.linspace(0.5, 0.4, 30)
    share[1, 45] = 0.1
    assert {0, 45} <= set(choose_experts(share))


def test_a_layer_without_tokens_is_balanced(tmp_path):
    empty = np.zeros((P, E), np.int64)
    rows = [make_row(empty, step=step) for step in range(3)]
    view = build(write_rows(tmp_path, rows))
    assert view["cells"]["worstBefore"] == [1.0] * 3
    assert view["drift"]["change"] == [[0, 0]]


def test_methods_are_plain_ep_and_planners():
    counts = hot_counts()
    plan = plan_method(counts, "plain", Topology())
    assert plan.is_fallback
    assert plan_method(counts, "exact", Topology()).imbalance_after == 1.0
    assert check_methods(["exact", "plain", "exact"], "--planners") == ("plain", "exact")
    with pytest.raises(ValueError, match="--planners lp"):
        check_methods(["lp"], "--planners")
    assert METHODS[0] == "plain"


@pytest.mark.parametrize(("ranks", "cells"), [(2, 10_000), (8, 10_000), (16, 5000), (64, 2000)])
def test_more_ranks_get_fewer_cells(ranks, cells):
    assert default_max_cells(make_info(num_ranks=ranks, num_experts=64)) == cells


def test_the_planted_cell_is_found(tmp_path):
    view = build(write_planted(tmp_path / "run"))
    cell = 1 * STEPS + HOT_STEP
    assert int(np.argmax(view["cells"]["worstBefore"])) == cell
    step, micro_batch, _, _, top, *_ = view["details"][cell]
    assert (step, micro_batch) == (HOT_STEP, HOT_BATCH)
    assert top[:2] == [HOT_EXPERT, 4200]
