"""Time from a count table to a plan, on one core.

python benchmarks/plan_time.py    # prints a table and writes results/plan_time.json; a minute

For each planner, size and workload: the median time of whole `make_plan` calls on an int64 [P, E]
table, in several rounds. What is reported is the best round's median, as other load on the machine
can only add to it. The threshold is 0, so that every call plans.

Shape letters: P ranks, E experts.
"""

import gc
import itertools
import os
import statistics
import time
from pathlib import Path

import numpy as np

from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner import Plan, compile_planners, make_plan

RESULTS = Path(__file__).parent / "results" / "plan_time.json"
PLANNERS = ("tolerant", "exact", "lla")
SIZES = ((8, 128), (8, 256), (64, 384), (256, 512))
"""P and E."""
WORKLOADS = ("lognormal-2", "lognormal-1", "hot-95-1", "hot-50-4", "balanced")
SEEDS = range(4)
ROUNDS = 5
SECONDS_PER_ROUND = 0.06


def plan_once(counts: np.ndarray, planner: str) -> Plan:
    """The call that is timed."""
    return make_plan(counts, planner=planner, imbalance_threshold=0.0)


def time_median(counts: np.ndarray, planner: str) -> float:
    """Median seconds of a plan, in the best of some rounds."""
    medians = []
    for _ in range(ROUNDS):
        seconds: list[float] = []
        until = time.perf_counter() + SECONDS_PER_ROUND
        while not seconds or time.perf_counter() < until:
            start = time.perf_counter()
            plan_once(counts, planner)
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds))
    return min(medians)


def measure() -> list[dict[str, object]]:
    """One row for each planner, size and workload; the median over seeds."""
    rows: list[dict[str, object]] = []
    cases = list(itertools.product(SIZES, WORKLOADS, PLANNERS))
    advance = start_progress(len(cases), "planning")
    for (P, E), workload, planner in cases:
        tables = [
            make_counts(
                workload, num_ranks=P, num_experts=E, tokens_per_rank=8192, top_k=4, seed=seed
            )
            for seed in SEEDS
        ]
        plans = [plan_once(counts, planner) for counts in tables]
        times = [time_median(counts, planner) for counts in tables]
        rows.append(
            {
                "planner": planner,
                "num_ranks": P,
                "num_experts": E,
                "workload": workload,
                "microseconds": round(statistics.median(times) * 1e6, 1),
                "transfers": statistics.median(len(plan.transfers) for plan in plans),
            }
        )
        advance()
    return rows


def main() -> None:
    """Pin this process to one core, measure, print, save."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    gc.disable()
    compile_planners()
    rows = measure()
    print(format_table([list(rows[0]), *(list(row.values()) for row in rows)], "<>><>"))
    write_results(RESULTS, {"numpy": np.__version__, "rows": rows})
    print(f"-> {RESULTS}")


if __name__ == "__main__":
    main()
