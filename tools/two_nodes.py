"""Train a small model over two nodes with a slow link between them, plain and with each planner.

    make nodes RATE=100mbit
    python tools/two_nodes.py my.yaml --rate 1gbit -- --moe-router-force-biased 1.0

Two network namespaces of this machine are the nodes; what crosses is counted at their interfaces.
The configuration is trained plain and with each planner; flags after `--` are for all trainings.
As root, on Linux, with iproute2; elsewhere it says so, and ends with 3.
"""

import argparse
import signal
import statistics
import sys
import tempfile
from pathlib import Path

from node_bed.bed import NoNamespacesError, join_two_nodes
from node_bed.predict import predict_bytes
from node_bed.trial import ROOT, WARM_UP, Trial, train_on

from megatron_llep.offline.launch.flags import split_extra
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table

CONFIG = ROOT / "configs" / "two-nodes.yaml"
ONE_NODE = ", one node"
METHODS: dict[str, list[str] | None] = {
    "plain": None,
    "lla": ["--moe-llep-planner", "lla"],
    "exact, one node": ["--moe-llep-planner", "exact"],
    "tolerant, one node": ["--moe-llep-planner", "tolerant"],
    "exact": ["--moe-llep-planner", "exact"],
    "tolerant": ["--moe-llep-planner", "tolerant"],
}
"""Flags of each beside those of the configuration; `one node`: told that all ranks share one."""
LOSS_TOLERANCE = 1e-5


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG, help="default: %(default)s")
    parser.add_argument("--rate", default="100mbit", help="of the link, each way, as tc reads it")
    parser.add_argument("--ranks-per-node", type=int, default=2, help="of the two (default: 2)")
    parser.add_argument(
        "--iterations", type=int, default=12, help="of a training; the first 3 warm up"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often each method trains, in turn"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--limit", type=float, default=600, help="seconds of one training at most")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results as JSON")
    return parser


def main() -> int:
    """Train, print the table, and say whether losses are those of plain."""
    own, extra = split_extra(sys.argv[1:])
    args = build_parser().parse_args(own)
    # So that the nodes are taken down then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.iterations <= WARM_UP:
        raise SystemExit(f"--iterations {args.iterations}: give {WARM_UP + 1} or more")
    methods = list(dict.fromkeys(["plain", *args.methods]))
    trials: dict[str, list[Trial]] = {method: [] for method in methods}
    Path("runs/nodes").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with join_two_nodes(args.rate) as nodes:
                for turn in range(args.rounds):
                    order = methods if turn % 2 == 0 else methods[::-1]
                    for number, method in enumerate(order):
                        print(f"two_nodes: round {turn + 1}, {method}", flush=True)
                        flags = [*extra, "--train-iters", str(args.iterations)]
                        llep = METHODS[method]
                        if llep is not None:
                            flags += [*llep, "--moe-llep-record", str(_place(folder, method))]
                            # Both nodes have this machine's name: they must be told.
                            told = args.ranks_per_node * (2 if method.endswith(ONE_NODE) else 1)
                            flags += ["--moe-llep-ranks-per-node", str(told)]
                        trials[method].append(
                            train_on(
                                nodes,
                                args.config,
                                flags,
                                ranks_per_node=args.ranks_per_node,
                                llep=llep is not None,
                                port=29500 + number,
                                log=_place("runs/nodes", f"{method}.log"),
                                limit=args.limit,
                            )
                        )
        except NoNamespacesError as error:
            print(f"two_nodes: {error}", file=sys.stderr)
            return 3
        predicted = _predict(folder, methods, args.ranks_per_node, args.iterations)
    rows, records = _make_rows(trials, predicted)
    print(f"\nlink of {args.rate} each way; {args.ranks_per_node} ranks a node; medians of steps")
    print(format_table(rows, "<" + ">" * (len(rows[0]) - 1)))
    print(
        "measured: at the interfaces, all that crosses; predicted: of the experts alone, from the"
    )
    print("recorded routing and plans. The rest of the model adds the same to all.")
    if args.output:
        write_results(
            args.output, {"command": " ".join(sys.argv), "rate": args.rate, "methods": records}
        )
    worst = _compare_losses(trials)
    print(f"losses: at most {worst:.1e} from plain's")
    return 0 if worst <= LOSS_TOLERANCE else 1


def _place(folder: str, method: str) -> Path:
    return Path(folder, method.replace(", ", "-").replace(" ", "-"))


def _predict(
    folder: str, methods: list[str], ranks_per_node: int, iterations: int
) -> dict[str, float]:
    """Bytes of a step for the experts' sake, of each method; plain's by the routing of another."""
    steps = range(WARM_UP, iterations)
    lending = [method for method in methods if METHODS[method] is not None]
    found = {}
    for method in lending:
        found[method] = predict_bytes(_place(folder, method), ranks_per_node, steps, lends=True)
    if lending:
        place = _place(folder, lending[0])
        found["plain"] = predict_bytes(place, ranks_per_node, steps, lends=False)
    return found


def _make_rows(
    trials: dict[str, list[Trial]], predicted: dict[str, float]
) -> tuple[list[list[object]], list[dict[str, object]]]:
    plain = statistics.median(trial.median_ms for trial in trials["plain"])
    rows: list[list[object]] = [
        ["", "ms a step", "plain / it", "MiB across", "predicted MiB", "rest MiB"]
    ]
    records: list[dict[str, object]] = []
    for method, of_method in trials.items():
        ms = statistics.median(trial.median_ms for trial in of_method)
        across = statistics.median(trial.step_bytes for trial in of_method) / 2**20
        of_experts = predicted.get(method, float("nan")) / 2**20
        cells = [f"{ms:.0f}", f"{plain / ms:.2f}", f"{across:.2f}", f"{of_experts:.2f}"]
        rows.append([method, *cells, f"{across - of_experts:.2f}"])
        records.append(
            {
                "method": method,
                "step_ms": [trial.step_ms for trial in of_method],
                "mib_across": across,
                "predicted_mib": of_experts,
            }
        )
    return rows, records


def _compare_losses(trials: dict[str, list[Trial]]) -> float:
    """The largest relative difference of any loss from plain's."""
    plain = trials["plain"][0].losses
    worst = 0.0
    for of_method in trials.values():
        for trial in of_method:
            if len(trial.losses) != len(plain):
                return float("inf")
            pairs = zip(trial.losses, plain, strict=True)
            worst = max([worst, *(abs(one - other) / abs(other) for one, other in pairs)])
    return worst


if __name__ == "__main__":
    sys.exit(main())
