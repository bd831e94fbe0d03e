"""Predicted against measured: what the rows say, and a trial run of the real thing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llep.config import LLEPConfig
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner import make_plan
from megatron_llep.planner.cost.model import LayerShape
from megatron_llep.planner.topology import ONE_NODE
from planner.cost.test_cost_model import MODEL

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.layer_ranks import Found, Job  # noqa: E402
from benchmarks.tune_error import format_page, make_rows  # noqa: E402

SIZES = {"num_ranks": 2, "hidden": 64, "ffn_hidden": 64, "num_experts": 8, "tokens_per_rank": 256}


def make_found(workloads):
    """In three rounds plain takes 4, 3, 9 seconds on the slowest rank, LLEP 2, 1, 3."""
    plans, seconds = {}, ({}, {})
    for workload in workloads:
        counts = make_counts(workload, num_ranks=2, num_experts=8, tokens_per_rank=256, top_k=1)
        plans[workload, "exact"] = make_plan(counts, planner="exact")
        for name, ranks in (
            ("plain", ([4.0, 2.0, 9.0], [1.0, 3.0, 1.0])),
            ("exact", ([2.0, 1.0, 1.0], [1.0, 1.0, 3.0])),
        ):
            for rank, taken in enumerate(ranks):
                seconds[rank][workload, name] = taken
    return [Found(seconds=of_rank, peak_bytes={}, plans=plans) for of_rank in seconds]


def make_job(workloads):
    variants = {"plain": None, "exact": LLEPConfig(planner="exact")}
    return Job(sizes=SIZES, variants=variants, workloads=workloads, rounds=3)


def test_the_ratios_are_those_of_the_slowest_rank_and_of_the_cost_model(tmp_path):
    workloads = ("balanced", "hot-95-1")
    rows = make_rows(make_job(workloads), make_found(workloads), MODEL, tmp_path)
    even, hot = rows
    assert (even.lent, even.predicted_ratio) == (0, 1)
    assert hot.ratio == 3.0  # of 2, 3, 3
    assert hot.quartiles == (2.5, 3.0)
    assert hot.plain_seconds == 4.0
    counts = make_counts("hot-95-1", num_ranks=2, num_experts=8, tokens_per_rank=256, top_k=1)
    shape = LayerShape(hidden=64, ffn_hidden=64, num_experts=8, top_k=1, bytes_per_element=4)
    plain, lending = (
        MODEL.predict_layer(plan, counts, shape, ONE_NODE).total
        for plan in (
            make_plan(counts, planner="exact", max_foreign=0),
            make_plan(counts, planner="exact"),
        )
    )
    assert hot.predicted_plain_seconds == plain
    assert hot.predicted_ratio == plain / lending
    assert hot.error == pytest.approx(plain / lending / 3 - 1)
    page = format_page(
        rows, machine="this one", load=0.25, command="python x", layer=SIZES, rounds=3
    )
    assert "How measured" in page
    assert f"{abs(hot.error):.1%} at worst" in page
    assert "hot-95-1" in page


def test_a_plan_that_did_not_run_is_noticed(tmp_path):
    found = make_found(("hot-95-1",))
    found[0].plans["hot-95-1", "exact"] = make_found(("hot-80-4",))[0].plans["hot-80-4", "exact"]
    with pytest.raises(ValueError, match="another plan"):
        make_rows(make_job(("hot-95-1",)), found, MODEL, tmp_path)


@pytest.mark.slow
def test_a_trial_run_of_the_errors(tmp_path):
    MODEL.save(tmp_path / "cost.json")
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/tune_error.py", "--rounds", "1", "--tokens", "64"),
            *("--workloads", "balanced", "hot-95-1", "--hidden", "64", "--ffn-hidden", "64"),
            *("--experts", "8", "--cost-model", str(tmp_path / "cost.json")),
            *("--output", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "tune_error.json").read_text())
    rows = {(row["workload"], row["setting"]): row for row in results["rows"]}
    assert len(rows) == 4
    assert all(row["plain_seconds"] > 0 for row in rows.values())
    assert rows["balanced", "exact"]["lent"] == 0
    assert rows["hot-95-1", "exact"]["lent"] == 1
    assert "How measured" in (tmp_path / "tune_error.md").read_text()
