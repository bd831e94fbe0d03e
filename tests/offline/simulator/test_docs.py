"""What docs/planners.md and docs/tuning.md say is what the code does."""

import dataclasses
import doctest
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_llep.offline.cli.routing import workload_counts
from megatron_llep.offline.simulator import MODELS, Case, ModelShape, simulate
from megatron_llep.planner import PLANNERS
from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.model import CostModel, LayerShape
from megatron_llep.planner.cost.presets import get_cost_model
from megatron_llep.planner.topology import Topology

ROOT = Path(__file__).resolve().parents[3]
PLANNERS_PAGE = ROOT / "docs" / "planners.md"
TUNING_PAGE = ROOT / "docs" / "tuning.md"


def test_worked_examples():
    failed, run = doctest.testfile(str(PLANNERS_PAGE), module_relative=False)
    assert run > 15
    assert failed == 0


def test_every_planner_has_a_section():
    page = PLANNERS_PAGE.read_text()
    for planner in PLANNERS:
        assert f"\n## {planner}\n" in page


def test_comparison_is_that_of_the_committed_data(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import compare_planners

    record = json.loads(compare_planners.RESULTS.read_text())
    assert compare_planners.RESULTS.with_suffix(".md").read_text() == (
        compare_planners.format_page(record)
    )
    page = PLANNERS_PAGE.read_text()
    for case in record["cases"][:2]:
        assert "\n".join(compare_planners.format_case(case)) in page


def test_paper_grid_table():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TUNING_PAGE.read_text().splitlines()
        if line.startswith(("| hot-", "| balanced"))
    ]
    assert len(rows) == 9
    for workload, *written in rows:
        assert written == predict_row(workload), workload


def predict_row(workload):
    cells = []
    for model in MODELS.values():
        counts = workload_counts(
            workload,
            num_ranks=8,
            num_experts=model.layer.num_experts,
            tokens=model.tokens_per_rank,
            top_k=model.layer.top_k,
            seed=0,
            repeat_experts=True,
        )
        case = Case(
            model=model, cost=get_cost_model("h200"), topology=Topology(), make_counts=counts
        )
        outcomes = simulate(case, ("plain", "lla", "exact"))
        plain = outcomes["plain"].layer.total
        cells += [f"{plain / outcomes[m].layer.total:.1f}" for m in ("lla", "exact")]
    return cells


@pytest.mark.parametrize("bandwidth", [450e9, 50e9])
@pytest.mark.parametrize(("refetch", "factor"), [(False, 1), (True, 4 / 3)])
@pytest.mark.parametrize("hidden", [64, 4096])
def test_break_even(bandwidth, refetch, factor, hidden):
    """The formula of docs/tuning.md, with nothing hidden and no fixed costs."""
    rate = 600e12
    link = Link(latency_seconds=0.0, bytes_per_second=bandwidth)
    cost = CostModel(
        machine="no fixed costs, nothing hidden",
        flops_per_second=rate,
        half_rate_tokens=0.0,
        gemm_overhead_seconds=0.0,
        backward_factor=2.0,
        copy_bytes_per_second=1e30,
        intra_node=link,
        inter_node=link,
        overlap=0.0,
        planning_seconds=0.0,
    )
    shape = LayerShape(hidden=hidden, ffn_hidden=hidden, num_experts=2, top_k=1, refetch=refetch)
    break_even = factor * rate / bandwidth
    assert f"{break_even:,.0f}" in TUNING_PAGE.read_text()
    for share, pays in ((0.99, False), (1.01, True)):
        # Both ranks have n pairs, all of expert 0: lending it moves n pairs, and no token crosses.
        n = int(share * break_even)
        counts = np.array([[n, 0], [n, 0]])
        case = Case(
            model=ModelShape(name="one", moe_layers=1, layer=shape, other_flops_per_token=0.0),
            cost=cost,
            topology=Topology(),
            make_counts=lambda layer, step, counts=counts: counts,
        )
        times = {
            method: dataclasses.replace(outcome.layer, exchange=0.0).total
            for method, outcome in simulate(case, ("plain", "exact")).items()
        }
        assert (times["exact"] < times["plain"]) == pays
