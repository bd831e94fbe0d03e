"""The layer benchmark: what its numbers mean, and a trial run of the real thing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_llep.config import LLEPConfig
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner import make_plan, sends
from megatron_llep.planner.cost.model import LayerCost, LayerShape
from planner.cost.test_cost_model import MODEL

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.layer_ranks import LIMIT, Found, Job, choose_as_if_lent  # noqa: E402
from benchmarks.layer_report import draw, format_rows, make_rows  # noqa: E402

SIZES = {
    "num_ranks": 2,
    "hidden": 64,
    "ffn_hidden": 64,
    "num_experts": 8,
    "tokens_per_rank": 256,
}


def test_what_the_rows_say(tmp_path):
    workloads = ("balanced", "hot-95-1")
    job = Job(
        sizes=SIZES,
        variants={"plain": None, "exact": LLEPConfig(planner="exact")},
        workloads=workloads,
        rounds=3,
    )
    counts = make_counts("hot-95-1", num_ranks=2, num_experts=8, tokens_per_rank=256, top_k=1)
    plan = make_plan(counts, planner="exact")
    even = make_counts("balanced", num_ranks=2, num_experts=8, tokens_per_rank=256, top_k=1)
    plain = make_plan(even, planner="exact")
    hot, exact = ("hot-95-1", "plain"), ("hot-95-1", "exact")
    limit = ("hot-95-1", LIMIT)
    balanced = {("balanced", name): [1.0, 1.0, 1.0] for name in (*job.variants, LIMIT)}
    ranks = [
        Found(
            seconds=balanced | {hot: [4.0, 2.0, 9.0], exact: [2.0, 1.0, 1.0], limit: [1.0] * 3},
            peak_bytes=dict.fromkeys(balanced, 100) | {hot: 200, exact: 110},
            plans={("balanced", "exact"): plain, exact: plan},
        ),
        Found(
            seconds=balanced | {hot: [1.0, 3.0, 1.0], exact: [1.0, 1.0, 3.0], limit: [1.0] * 3},
            peak_bytes=dict.fromkeys(balanced, 90) | {hot: 50, exact: 120},
            plans={("balanced", "exact"): plain, exact: plan},
        ),
    ]
    shape = LayerShape(hidden=64, ffn_hidden=64, num_experts=8, top_k=1, bytes_per_element=4)
    rows = {
        (row.workload, row.variant): row
        for row in make_rows(job, ranks, LayerCost(model=MODEL, shape=shape))
    }
    assert rows[hot].seconds == 4.0  # of 4, 3, 9
    assert rows[exact].seconds == 2.0  # of 2, 1, 3
    assert rows[exact].speedup == 3.0  # of 2, 3, 3
    assert rows[exact].limit == 4.0  # of 4, 3, 9
    assert rows[exact].to_balanced == 2.0
    assert rows[exact].peak_bytes == 120
    assert rows[exact].peak_to_balanced == 1.2
    assert rows[exact].imbalance == 1.0
    assert (
        rows[exact].lent_bytes == rows[exact].returned_bytes == len(plan.transfers) * 3 * 64**2 * 4
    )
    sent = np.stack([sends(plan, counts, r).sum(axis=0) for r in range(2)])
    crossing = sent.sum() - np.trace(sent)
    assert rows[exact].token_bytes == crossing * 64 * 4 * 4
    assert rows["balanced", "exact"].predicted_speedup == 1
    table = format_rows(list(rows.values()))
    assert "predicted against measured" in table
    assert all(workload in table for workload in workloads)
    draw(list(rows.values()), "a caption", tmp_path / "layer.png")
    assert (tmp_path / "layer.png").stat().st_size > 10_000


def test_the_limit_has_the_loads_of_the_plan():
    variants = {"plain": None}
    job = Job(sizes=SIZES, variants=variants, workloads=("hot-95-1",), rounds=1)
    counts = make_counts("hot-95-1", num_ranks=2, num_experts=8, tokens_per_rank=256, top_k=1)
    plan = make_plan(counts, planner="exact")
    experts = np.stack([choose_as_if_lent(rank, job, "hot-95-1").numpy() for rank in range(2)])
    np.testing.assert_array_equal(np.bincount(experts.ravel() // 4), plan.load_per_rank_after)
    sent = np.stack([sends(plan, counts, rank).sum(axis=0) for rank in range(2)])
    for rank in range(2):  # the same tokens cross the wire
        np.testing.assert_array_equal(np.bincount(experts[rank].ravel() // 4), sent[rank])


@pytest.mark.slow
def test_a_trial_run(tmp_path):
    MODEL.save(tmp_path / "cost.json")
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/bench_layer.py", "--quick", "--rounds", "1"),
            *("--workloads", "hot-95-1", "--planners", "exact", "auto"),
            *("--cost-model", str(tmp_path / "cost.json"), "--output", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "layer.json").read_text())
    rows = {(row["workload"], row["variant"]): row for row in results["rows"]}
    assert len(rows) == 2 * 3
    assert results["sizes"] == SIZES
    assert "torch" in results["machine"]
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["balanced", "exact"]["lent_experts"] == 0
    assert rows["hot-95-1", "plain"]["imbalance"] > 1.9
    assert rows["hot-95-1", "exact"]["imbalance"] == 1.0
    assert rows["hot-95-1", "exact"]["lent_experts"] == 1
    assert (tmp_path / "layer.png").stat().st_size > 10_000
