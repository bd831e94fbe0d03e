"""Compare planners on the same loads: balance, experts moved, slots, token traffic, plan time.

python benchmarks/compare_planners.py             # write results/planners.md from planners.json
python benchmarks/compare_planners.py --measure   # make that file first: a minute, if nothing runs

Loads are log-normal with sigma 2, 32,768 (token, expert) pairs a rank, 8 seeds. In `even` all ranks
have as many pairs; in `ragged` each has between none and all, so that P rarely divides the sum.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llep.offline.lp import lp_quota, solve_lp
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.simulator.eplb import place_replicas, spread_evenly
from megatron_llep.offline.timing import median_seconds
from megatron_llep.offline.workloads import WORKLOADS, Workload, make_counts
from megatron_llep.planner import (
    Plan,
    compile_planners,
    imbalance_of,
    make_plan,
    plan_from_quota,
)
from megatron_llep.planner.cost.traffic import count_tokens
from megatron_llep.planner.topology import Topology

RESULTS = Path(__file__).parent / "results" / "planners.json"
SIZES = ((8, 256), (16, 256), (64, 512), (256, 1024))
"""P and E."""
SEEDS = range(8)
PAIRS_PER_RANK = 32768
TOKEN_BYTES = 7168 * 2
"""DeepSeek-V3's hidden size in bf16."""
REPEATS = 15
WINDOW = 10
"""Steps that EPLB's placement looks back on."""
SPARE_SLOTS = 1
"""Slots a rank that EPLB has for replicas."""

_LOGNORMAL = WORKLOADS["lognormal-2"]
ROUTINGS: dict[str, Workload] = {
    "even": _LOGNORMAL,
    "ragged": dataclasses.replace(_LOGNORMAL, count_tokens=WORKLOADS["ragged"].count_tokens),
}
LABELS = {
    "published": "LLA, as in the published code",
    "lla": "lla",
    "exact": "exact (after MoonEP)",
    "tolerant": "tolerant, 5%",
    "tolerant-0": "tolerant, 0%",
    "lp": "LP optimum, holders of tolerant 5%",
    "eplb": "EPLB-style placement, moved once",
}


def published_quota(loads: list[int], P: int, capacity_factor: float, m: int) -> np.ndarray:
    """Quotas [E, P] of LLA as its published code has it.

    `planner.lla` has the same steps. Two things differ (SalesforceAIResearch/LeastLoadedEP,
    llep/gpt_oss_llep.py): the capacity is rounded *down*, so that with all ranks full some tokens
    are left over whenever P does not divide their number; and there is no bound on foreign slots. A
    left-over goes to the least loaded rank, above its capacity, which makes that rank spill its
    next expert, and so on.
    """
    E = len(loads)
    M = E // P
    capacity = int(capacity_factor * (sum(loads) // P))
    effective = [sum(loads[g * M : (g + 1) * M]) for g in range(P)]  # assigned and pending
    quota = np.zeros((E, P), dtype=np.int64)
    for expert in sorted(range(E), key=lambda e: -loads[e]):
        home = expert // M
        spill = min(max(effective[home] - capacity, 0), loads[expert])
        quota[expert, home] = loads[expert] - spill
        if not spill:
            continue
        effective[home] -= spill
        others = sorted((g for g in range(P) if g != home), key=effective.__getitem__)
        for g in others:
            chunk = min(spill, capacity - effective[g])
            if chunk <= 0 or (chunk < m and spill > chunk):
                continue
            quota[expert, g] += chunk
            effective[g] += chunk
            spill -= chunk
        if spill:  # all are full; where home kept some, who is least loaded is looked up again
            again = min(others, key=lambda rank: (effective[rank], rank))
            g = again if quota[expert, home] else others[0]
            quota[expert, g] += spill
            effective[g] += spill
    return quota


def measure_case(P: int, E: int, routing: str) -> dict[str, Any]:
    """All methods over all seeds: lists of figures by method."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in LABELS}
    before = []
    for seed in SEEDS:
        history = [_make_counts(routing, P, E, seed, step) for step in range(WINDOW)]
        counts = _make_counts(routing, P, E, seed, WINDOW)
        for name, row in _measure_seed(counts, np.sum(history, axis=(0, 1))).items():
            rows[name].append(row)
        before.append(imbalance_of(counts.sum(axis=0).reshape(P, -1).sum(axis=1).tolist()))
    return {"P": P, "E": E, "routing": routing, "before": before, "methods": rows}


def _make_counts(routing: str, P: int, E: int, seed: int, step: int) -> np.ndarray:
    return make_counts(
        ROUTINGS[routing],
        num_ranks=P,
        num_experts=E,
        tokens_per_rank=PAIRS_PER_RANK,
        top_k=1,
        seed=seed,
        step=step,
    )


def _measure_seed(counts: np.ndarray, recent: np.ndarray) -> dict[str, dict[str, float]]:
    """Every method on counts [P, E]; `recent` are the loads [E] that EPLB placed by."""
    P, E = counts.shape
    loads = counts.sum(axis=0)

    def planner(name: str, tolerance: float = 0.05) -> Callable[[], Plan]:
        # Without a threshold, so that what lends always lends.
        return lambda: make_plan(
            counts,
            planner=name,
            tolerance=tolerance,
            min_tokens_per_gemm=1,
            imbalance_threshold=0.0,
        )

    plans: dict[str, Callable[[], Plan]] = {
        "lla": planner("lla"),
        "exact": planner("exact"),
        "tolerant": planner("tolerant"),
        "tolerant-0": planner("tolerant", 0.0),
    }
    found = {name: _describe(make(), counts, make) for name, make in plans.items()}

    as_list = loads.tolist()

    def published() -> np.ndarray:
        return published_quota(as_list, P, 1.0, 1)

    plan = plan_from_quota(published())
    found["published"] = _describe(plan, counts, published)

    tolerant = plans["tolerant"]()
    holders = tolerant.quota > 0
    holders[np.arange(E), np.arange(E) // (E // P)] = True
    found["lp"] = _describe(
        plan_from_quota(lp_quota(loads, holders)),
        counts,
        lambda: lp_quota(loads, holders),
    )
    found["lp"]["imbalance"] = solve_lp(loads, holders) * P / int(loads.sum())

    def place() -> np.ndarray:
        return place_replicas(recent, P, E // P + SPARE_SLOTS)

    placed = place()
    row = _describe(plan_from_quota(spread_evenly(loads, placed)), counts, place)
    home = np.zeros_like(placed)
    home[np.arange(E), np.arange(E) // (E // P)] = 1
    row |= {"moved": float(((placed > 0) & (home == 0)).sum()), "slots": SPARE_SLOTS}
    return found | {"eplb": row}


def _describe(plan: Plan, counts: np.ndarray, make: Callable[[], object]) -> dict[str, float]:
    """Of a plan for counts [P, E]; `make` is what is timed."""
    tokens = count_tokens(plan, counts, Topology())[:, 0].sum()
    return {
        "imbalance": plan.imbalance_after,
        "moved": len(plan.transfers),
        "slots": plan.max_foreign,
        "token_gigabytes": float(tokens) * TOKEN_BYTES / 1e9,
        "seconds": median_seconds(make, REPEATS),
    }


def format_case(case: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table for one case."""
    before = statistics.median(case["before"])
    lines = [
        f"P = {case['P']}, E = {case['E']}, {case['routing']}; plain expert parallelism: "
        f"{before:.2f} x mean",
        "",
        "| planner | largest load | experts moved | most slots | token traffic | plan time |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in LABELS.items():
        rows = case["methods"][name]

        def median(key: str, rows: list[dict[str, float]] = rows) -> float:
            return statistics.median(row[key] for row in rows)

        moved = [int(row["moved"]) for row in rows]
        lines.append(
            f"| {label} | {median('imbalance'):.3f} | {statistics.median(moved):g} "
            f"({min(moved)} to {max(moved)}) | {max(int(row['slots']) for row in rows)} | "
            f"{median('token_gigabytes'):.2f} GB | {median('seconds') * 1e6:.0f} us |"
        )
    return [*lines, ""]


def format_page(record: dict[str, Any]) -> str:
    """All tables."""
    head = [
        "# Planners compared",
        "",
        "By `benchmarks/compare_planners.py`; docs/planners.md says what is compared.",
        f"Machine: {record['machine']}; plan time on one core.",
        "",
    ]
    lines = [line for case in record["cases"] for line in format_case(case)]
    return "\n".join(head + lines)


def main() -> None:
    """Measure if asked to; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help=f"make {RESULTS.name} first")
    args = parser.parse_args()
    if args.measure:
        compile_planners()
        cases = [measure_case(P, E, routing) for P, E in SIZES for routing in ROUTINGS]
        write_results(RESULTS, {"cases": cases})
    page = format_page(json.loads(RESULTS.read_text()))
    RESULTS.with_suffix(".md").write_text(page)
    print(page, end="")


if __name__ == "__main__":
    main()
