"""Predictions beside the LLEP paper's curves: the fit, its halves, assumptions, and the page."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llep.offline.paper import page
from megatron_llep.offline.paper.comparison import Comparison, compare
from megatron_llep.offline.paper.figures import (
    FIGURE_4,
    FIGURE_6A,
    FIGURE_6B,
    FIGURE_7A,
    FIGURE_9,
    FITTED,
    OTHERS,
    Point,
    Setting,
    list_repeated,
)
from megatron_llep.offline.paper.fit import fit_fixed_seconds, split_halves
from megatron_llep.offline.paper.predict import Prediction, predict, route
from megatron_llep.planner import make_plan
from megatron_llep.planner.cost.model import LayerShape
from megatron_llep.planner.cost.presets import get_cost_model
from megatron_llep.planner.topology import ONE_NODE

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))

import paper_curves  # noqa: E402

TUNING_PAGE = ROOT / "docs" / "tuning.md"
COST = get_cost_model("h200")
SETTING = Setting(hidden=64, ffn_hidden=32, num_experts=16, top_k=2, tokens=4096, percent=80, hot=2)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(COST)


def find_imbalance(setting, groups):
    """Largest / mean load of so many groups of experts."""
    loads = route(setting).sum(axis=0).reshape(groups, -1).sum(axis=1)
    return loads.max() / loads.mean()


@st.composite
def layers(draw, least=3):
    """Plain and method seconds of layers that lend."""
    seconds = st.floats(1e-3, 1.0)
    return draw(st.lists(st.tuples(seconds, seconds), min_size=least, max_size=20))


def plant(layers, fixed):
    """Points of layers that have exactly these fixed costs, one each."""
    predictions, points = {}, []
    for tokens, ((plain, method), cost) in enumerate(zip(layers, fixed, strict=True)):
        setting = dataclasses.replace(SETTING, tokens=tokens)
        predictions[setting] = Prediction(plain_seconds=plain, method_seconds=method, lends=True)
        points.append(Point(setting=setting, speedup=plain / (method + cost)))
    return points, predictions


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(layers=layers(), fixed=st.floats(0, 0.1))
def test_a_planted_fixed_cost_is_found(layers, fixed):
    points, predictions = plant(layers, [fixed] * len(layers))
    # A layer that lends nothing pays nothing, and says nothing.
    idle = dataclasses.replace(SETTING, tokens=10**6)
    predictions[idle] = Prediction(plain_seconds=1.0, method_seconds=1.0, lends=False)
    points.append(Point(setting=idle, speedup=0.5))
    found = fit_fixed_seconds(points, predictions)
    assert found == pytest.approx(fixed, abs=1e-12)
    for point in points[:-1]:
        assert predictions[point.setting].speedup(found) == pytest.approx(point.speedup)
    assert predictions[idle].speedup(found) == 1.0


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(layers=layers(), seed=st.integers(0, 99), step=st.floats(-0.05, 0.05))
def test_no_other_cost_has_a_lesser_sum_of_errors(layers, seed, step):
    costs = np.random.default_rng(seed).uniform(0, 0.1, len(layers))
    points, predictions = plant(layers, costs)

    def sum_errors(fixed):
        times = [method + cost for (_, method), cost in zip(layers, costs, strict=True)]
        return sum(abs(fixed - c) / t for c, t in zip(costs, times, strict=True))

    found = fit_fixed_seconds(points, predictions)
    assert sum_errors(found) <= sum_errors(found + step) + 1e-9


def test_a_cost_below_zero_is_none():
    points, predictions = plant([(1.0, 0.5)] * 3, [-0.1] * 3)
    assert fit_fixed_seconds(points, predictions) == 0
    with pytest.raises(ValueError, match="no point lends"):
        fit_fixed_seconds([], {})


def test_halves_are_disjoint_and_always_the_same():
    fitted, tested = (list(map(id, half)) for half in split_halves(FITTED))
    assert not set(fitted) & set(tested)
    assert sorted(fitted + tested) == sorted(id(p) for f in FITTED for p in f.points)
    assert (fitted, tested) == tuple(list(map(id, half)) for half in split_halves(FITTED))
    # The fields of one figure, by hand: the first, third and fifth of the first row, then ...
    fitted, tested = split_halves([FIGURE_6A])
    assert [p.speedup for p in fitted] == [
        0.66,
        1.39,
        2.24,
        1.33,
        2.64,
        1.15,
        2.78,
        4.73,
        2.09,
        4.29,
    ]
    for half in (fitted, tested):
        for row in FIGURE_6A.rows.values():
            assert set(row) & set(half)
        for column in zip(*FIGURE_6A.rows.values(), strict=True):
            assert set(column) & set(half)


def test_what_is_predicted_is_the_cost_model_forward_only():
    prediction = predict(SETTING, COST)
    counts = route(SETTING)
    assert counts.sum() == 8 * 4096 * 2
    assert counts[:, :2].sum() / counts.sum() == pytest.approx(0.8, abs=1e-3)
    plan = make_plan(counts, planner="lla")
    shape = LayerShape(hidden=64, ffn_hidden=32, num_experts=16, top_k=2, scatter_from=0)
    times = [
        dataclasses.replace(COST, planning_seconds=fixed).predict_layer(
            p, counts, shape, ONE_NODE, forward_only=True, order="rank_order"
        )
        for p, fixed in ((make_plan(counts, planner="lp"), 0.0), (plan, 0.25))
    ]
    assert prediction.lends
    assert times[1].returning == 0
    assert prediction.speedup(0.25) == pytest.approx(times[0].total / times[1].total)


def test_figure_7a_is_of_128_experts_and_of_the_load_per_rank():
    """Its fall-backs, which are where it jumps to 1, are those of the setting that is assumed."""
    for percent, last in (("15% into 4", 1.86), ("20% into 4", 2.22)):
        for point in FIGURE_7A.rows[percent]:
            assert predict(point.setting, COST).lends == (point.speedup < 1)
            assert find_imbalance(point.setting, 8) == pytest.approx(last, abs=5e-3)
            assert find_imbalance(point.setting, 128) > 4.7
    for experts in (64, 256):  # another number would fall back elsewhere
        wrong = 0
        for percent in ("15% into 4", "20% into 4"):
            for point in FIGURE_7A.rows[percent]:
                imbalance = find_imbalance(
                    dataclasses.replace(point.setting, num_experts=experts), 8
                )
                wrong += (imbalance >= point.setting.threshold) != (point.speedup < 1)
        assert wrong


def test_lambda_matters_at_one_point_alone():
    below = [
        point
        for figure in (*FITTED, FIGURE_6B)
        for point in figure.points
        if find_imbalance(point.setting, 8) < 1.3
    ]
    assert below == [FIGURE_9.rows["30% into 4"][0]]
    assert below[0].speedup < 1


def test_figures_that_repeat_a_setting_nearly_agree():
    repeated = list_repeated((*FITTED, *OTHERS))
    assert [len(speedups) for speedups in repeated] == [4] * 4
    assert max(speedups[-1] / speedups[0] for speedups in repeated) < 1.1


def test_the_page_is_what_the_tool_makes(comparison):
    section = page.make_section(comparison)
    text = TUNING_PAGE.read_text()
    assert page.replace_section(text, section) == text
    assert page.replace_section(text, "") != text


def test_the_tool(tmp_path, capsys):
    copy = tmp_path / "page.md"
    copy.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    paper_curves.main(["--write", str(copy)])
    made = copy.read_text()
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert "old" not in made
    between = TUNING_PAGE.read_text().partition(page.BEGIN)[2].partition(page.END)[0]
    assert between in made
    capsys.readouterr()
    paper_curves.main(["--machine", "h100"])
    other = capsys.readouterr().out
    assert len(other.splitlines()) == len(between.strip().splitlines())
    assert other.strip() != between.strip()
    with pytest.raises(SystemExit):
        paper_curves.main(["--machine", "h100", "--write"])
    assert "tuning.md is about h200" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", page.BEGIN, page.END + page.BEGIN, 2 * (page.BEGIN + page.END)]
)
def test_a_page_without_its_markers(text):
    with pytest.raises(ValueError, match="once each"):
        page.replace_section(text, "new")


def read_tables(text):
    """Cells of every table, by its first one."""
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    rows = [[line.strip("| ").split(" | ") for line in t.splitlines()] for t in tables]
    return {table[0][0]: table for table in rows}


def test_stated_errors_are_those_of_the_stated_numbers(comparison):
    """Worked out again from the tables' cells, to what rounding leaves."""
    tables = read_tables(page.make_section(comparison))
    stated = {row[0]: row[1:] for row in tables["error of the speed-up"][2:]}
    cells = {
        f"Figure 4, {model}": [row[1 + i] for row in tables["Figure 4, routing"][2:]]
        for i, model in enumerate(FIGURE_4.columns)
    }
    for name, table in (("6b", "Figure 6b, alpha"), ("7a", "Figure 7a, lambda")):
        cells[f"Figure {name}"] = [cell for row in tables[table][2:] for cell in row[1:]]
    cells["all points kept from the fit"] = [
        cell
        for figure in FITTED
        for i, row in enumerate(tables[f"Figure {figure.name}, {figure.corner}"][2:])
        for j, cell in enumerate(row[1:])
        if (i + j) % 2
    ]
    for name, shown in cells.items():
        numbers = np.array([list(map(float, cell.split(" / "))) for cell in shown])
        assert int(stated[name][0]) == len(numbers)
        for column, (median, worst, above) in enumerate((stated[name][1:4], stated[name][4:]), 1):
            errors = np.abs(numbers[:, column] / numbers[:, 0] - 1)
            assert float(median.strip("%")) / 100 == pytest.approx(np.median(errors), abs=0.016)
            assert float(worst.strip("%")) / 100 == pytest.approx(errors.max(), abs=0.016)
            surely = (numbers[:, column] > numbers[:, 0]).sum()
            assert surely <= int(above) <= (numbers[:, column] >= numbers[:, 0]).sum()


def test_stated_numbers_follow_the_predictions(comparison):
    """With every layer that lends twice as long, all that is stated is another."""
    slower = dataclasses.replace(
        comparison,
        predictions={
            setting: dataclasses.replace(p, method_seconds=2 * p.method_seconds)
            for setting, p in comparison.predictions.items()
        },
        fixed_seconds=2 * comparison.fixed_seconds,
    )
    before, after = (page.make_section(each).splitlines() for each in (comparison, slower))
    assert f"{slower.fixed_seconds * 1e3:.1f} ms" in after[0]
    for row in (line for line in before if line.startswith(("| all", "| of", "| Figure 4, d"))):
        assert row not in after


def test_what_the_words_say(comparison):
    """Where the page calls the model optimistic it is, and where it does not it is near."""
    gpt, *others = [
        comparison.agree([row[i] for row in FIGURE_4.rows.values()])[1] for i in range(3)
    ]
    assert gpt.worst < 0.1
    for model in others:
        assert model.above >= 12
        assert model.median > 0.15
    few = [point for point in FIGURE_9.points if point.setting.num_experts < 128]
    assert comparison.agree(few)[1].above == len(few)
    _, tested = split_halves(FITTED)
    as_it_is, fixed = comparison.agree(tested)
    assert as_it_is.above == len(tested)
    assert fixed.median < as_it_is.median / 5
