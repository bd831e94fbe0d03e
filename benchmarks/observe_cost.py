"""What `--moe-llep-planner observe` costs: steps of the demo's model, plain and observed in turn.

    python -m benchmarks.observe_cost    # or python benchmarks/observe_cost.py; some minutes

Prints a table and writes results/observe_cost.json.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_llep.offline.ranks import run_ranks
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table

# As a script this file has its own folder on the path alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.observe_ranks import (
    OBSERVED,
    ORDER,
    PLAIN,
    RANKS,
    Found,
    Job,
    train_in_turns,
)

RESULTS = Path(__file__).parent / "results" / "observe_cost.json"
LIMIT = 0.01
"""Of a step, that observing may cost."""
METHOD = f"""\
The model of configs/demo.yaml on {RANKS} ranks with expert parallelism, in one process group over
gloo, each rank on a core: forward, backward, Adam and the report of MoE metrics, as in Megatron's
loop. The same model takes steps in blocks, in the order {"-".join(ORDER)};
observed, hooks are on its routers, and every step's report gathers, measures and plans ahead.
  ratio      median observed step / median plain step
  own_share  time in hooks, and in what reports do besides Megatron's, over the time of observed
             steps; waiting for the other rank is in it. It shows what the ratio's noise hides"""


def summarise(found: list[Found]) -> list[dict[str, Any]]:
    """A row for each rank."""
    rows = []
    for rank, each in enumerate(found):
        plain, observed = (statistics.median(each.seconds[name]) for name in (PLAIN, OBSERVED))
        total = sum(each.seconds[OBSERVED])
        rows.append(
            {
                "rank": rank,
                "plain_ms": round(plain * 1e3, 2),
                "observed_ms": round(observed * 1e3, 2),
                "ratio": round(observed / plain, 4),
                "own_ms": round(statistics.median(each.own_seconds) * 1e3, 3),
                "own_share": round(sum(each.own_seconds) / total, 5),
                "steps": len(each.seconds[PLAIN]),
            }
        )
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="of four blocks (default: 6)")
    parser.add_argument("--steps", type=int, default=6, help="of a block (default: 6)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="about the machine, to be kept with the result")
    args = parser.parse_args()
    rows = summarise(run_ranks(train_in_turns, RANKS, Job(rounds=args.rounds, steps=args.steps)))
    method = f"{METHOD}\n{args.rounds} rounds of blocks of {args.steps} steps, after a shorter one."
    print(
        f"{method}\n\n{format_table([list(rows[0]), *(list(row.values()) for row in rows)], '>')}"
    )
    worst = max(row["own_share"] for row in rows)
    print(f"own calls: at most {worst:.2%} of a step, the limit is {LIMIT:.0%}")
    results = {"torch": torch.__version__, "method": method.splitlines(), "rows": rows}
    if args.note:
        results["note"] = args.note
    write_results(args.output, results)
    print(f"-> {args.output}")


if __name__ == "__main__":
    main()
