"""Random cases of real MoE layers on gloo ranks: LLEP must be plain Megatron, and never hang.

    make chaos DRAWS=200 SEED=0            # or python tools/run_chaos.py --draws 200 --seed 0
    make chaos DRAWS=1 SEED=0 FIRST=17     # repeat one

Each draw, from a seed and a number alone, is a layout, a model of one or two MoE layers, routing
with some skew, a planner and its settings, recompute, and delays. It runs forward and backward with
LLEP and without, under Megatron's DDP; outputs and gradients must be the same up to rounding. One
that takes longer than --limit is a hang: it is told where each rank waits, and new ranks go on.

Appends to benchmarks/results/chaos.json, after each 50 draws. Exits with 1 if one failed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_llep.device import use_cpu_if_no_gpu
from megatron_llep.offline.report.progress import start_progress

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"
DRAWS = 200
BLOCK = 50
LIMIT_SECONDS = 120.0


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--draws", type=int, default=DRAWS, help=f"how many (default: {DRAWS})")
    add("--seed", type=int, default=0, help="of all draws (default: 0)")
    add("--first", type=int, default=0, help="number of the first draw (default: 0)")
    add(
        "--limit",
        type=float,
        default=LIMIT_SECONDS,
        help=f"seconds after which a draw is a hang (default: {LIMIT_SECONDS:.0f})",
    )
    add("--results", type=Path, default=RESULTS, help="file to append to")
    return parser


def run_block(
    seed: int,
    numbers: range,
    limit: float,
    commit: str,
    advance: Callable[[], None],
    disturb: Any = None,
) -> dict[str, Any]:
    """Run draws, print those that fail, and return the entry of the result file.

    Args:
        seed: of all draws.
        numbers: which.
        limit: seconds after which a draw is a hang.
        commit: what is run.
        advance: called after each draw.
        disturb: for tests; see `compare` of tests/chaos_draws.
    """
    from chaos_draws.record import describe_block
    from chaos_draws.session import run_draws

    start = time.monotonic()
    outcomes = []
    for outcome in run_draws(seed, numbers, limit=limit, disturb=disturb):
        outcomes.append(outcome)
        advance()
        if outcome.verdict != "same":
            print(f"{outcome.draw.name} {outcome.verdict}; repeat it: {outcome.draw.command}")
            print(f"  {outcome.draw}", *outcome.details, sep="\n  ", flush=True)
    seconds = time.monotonic() - start
    return describe_block(seed, numbers, outcomes, seconds=seconds, commit=commit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the draws; returns the exit code.

    Args:
        arguments: default: those of the command line.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    for name, least in (("draws", 1), ("first", 0)):
        value = getattr(options, name)
        if value < least:
            parser.error(f"--{name} {value}: give a number of draws, {least} or more")
    if not options.limit > 0:
        parser.error(f"--limit {options.limit}: give a number of seconds above 0")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    use_cpu_if_no_gpu()
    sys.path.insert(0, str(ROOT / "tests"))
    from chaos_draws.record import append_run, read_commit

    commit = read_commit(options.results)
    end = options.first + options.draws
    advance = start_progress(options.draws, "draws")
    failed = 0
    for first in range(options.first, end, BLOCK):
        entry = run_block(
            options.seed, range(first, min(first + BLOCK, end)), options.limit, commit, advance
        )
        failed += entry["failed"]
        totals = append_run(options.results, entry)
        print(
            f"seed {options.seed}, draws {first} to {first + entry['draws'] - 1}: "
            f"{entry['failed']} failed, {entry['lent']} lent {entry['experts_lent']} experts, "
            f"{entry['seconds']:.0f} s; {totals['draws']} draws in {options.results.name}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
