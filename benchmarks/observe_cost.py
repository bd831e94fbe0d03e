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
  wall, cpu  time that passed, and time of the processor in the thread that trains, which leaves out
             what other processes do, and waiting for the other rank
  ratio      median observed step / median plain step
  own_share  time in hooks, and in what reports do besides Megatron's, over the time of observed
             steps; it shows what the ratio's noise hides"""
CLOCKS = {"wall": 0, "cpu": 1}


def summarise(found: list[Found]) -> list[dict[str, Any]]:
    """A row for each rank."""
    rows = []
    for rank, each in enumerate(found):
        row: dict[str, Any] = {"rank": rank, "steps": len(each.steps[PLAIN])}
        for name, clock in CLOCKS.items():
            plain, observed = ([span[clock] for span in each.steps[v]] for v in (PLAIN, OBSERVED))
            own = [span[clock] for span in each.own]
            medians = [statistics.median(seconds) for seconds in (plain, observed, own)]
            row |= {
                f"{name}_plain_ms": round(medians[0] * 1e3, 2),
                f"{name}_observed_ms": round(medians[1] * 1e3, 2),
                f"{name}_ratio": round(medians[1] / medians[0], 4),
                f"{name}_own_ms": round(medians[2] * 1e3, 3),
                f"{name}_own_share": round(sum(own) / sum(observed), 5),
            }
        rows.append(row)
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
    table = [["rank", *(row["rank"] for row in rows)]]
    table += [[name, *(row[name] for row in rows)] for name in rows[0] if name != "rank"]
    print(f"{method}\n\n{format_table(table)}")
    for name in CLOCKS:
        worst = max(row[f"{name}_own_share"] for row in rows)
        print(f"own calls, {name}: {worst:.2%} of a step on the worst rank; the limit: {LIMIT:.0%}")
    results = {"torch": torch.__version__, "method": method.splitlines(), "rows": rows}
    if args.note:
        results["note"] = args.note
    write_results(args.output, results)
    print(f"-> {args.output}")


if __name__ == "__main__":
    main()
