"""What crosses between nodes of 8 ranks under each plan, counted; and how long planning takes.

python benchmarks/nodes_table.py    # prints a table, writes results/nodes.json; two minutes

DeepSeek-V3's layer (256 experts, hidden 7168, ffn 2048, 8 experts a token), bf16 with gradients in
fp32, forward and backward. Log-normal routing, the same on all nodes, or each node with its own hot
experts. Tokens stay on their rank, then in their node. Medians over seeds. Busiest is what a layer
waits for: of each exchange (dispatch, combine, forward and backward) the direction of a node's link
that carries most, summed; `one way` is what one direction carries in all of them. Inside: how long
the busiest link inside a node takes, of the time of the busiest between nodes, by the preset h200.

Shape letters: P ranks, E experts, N nodes.
"""

import itertools
import statistics
import time
from pathlib import Path

import numpy as np

from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner import Topology, compile_planners, make_plan
from megatron_llep.planner.cost.across import count_node_bytes
from megatron_llep.planner.cost.model import LayerShape
from megatron_llep.planner.cost.presets import get_cost_model
from megatron_llep.planner.cost.traffic import count_lending, count_tokens
from megatron_llep.planner.plan import Plan

RESULTS = Path(__file__).parent / "results" / "nodes.json"
SHAPE = LayerShape(hidden=7168, ffn_hidden=2048, num_experts=256, top_k=8)
MACHINE = get_cost_model("h200")
PER_NODE = 8
NODES = Topology(ranks_per_node=PER_NODE)
RANKS = (16, 32, 64)
TOKENS = (4096, 16384)
SIGMAS = (1, 2)
SEEDS = range(5)
ROUNDS = 20
METHODS: dict[str, dict[str, object]] = {
    "plain": {"planner": "exact", "max_foreign": 0},
    "tolerant, one node": {"planner": "tolerant"},
    "exact, one node": {"planner": "exact"},
    "tolerant": {"planner": "tolerant", "topology": NODES},
    "exact": {"planner": "exact", "topology": NODES},
}
"""`one node`: planned as if all ranks were on one."""
WAYS = ("busiest", "one_way")


def route(ranks: int, tokens: int, sigma: int, alike: bool, seed: int) -> np.ndarray:
    """Counts int64 [P, E]."""

    def make(seed: int) -> np.ndarray:
        return make_counts(
            f"lognormal-{sigma}",
            num_ranks=ranks,
            num_experts=SHAPE.num_experts,
            tokens_per_rank=tokens,
            top_k=SHAPE.top_k,
            seed=seed,
        )

    if alike:
        return make(seed)
    nodes = range(0, ranks, PER_NODE)
    return np.concatenate([make(1000 * (i + 1) + seed)[i : i + PER_NODE] for i in nodes])


def look_at(counts: np.ndarray, options: dict[str, object]) -> dict[str, float]:
    """One plan's figures, in gigabytes and microseconds."""
    plan = make_plan(counts, prices=SHAPE.prices, **options)  # type: ignore[arg-type]
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        make_plan(counts, prices=SHAPE.prices, **options)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - start)
    across = count_node_bytes(plan, counts, SHAPE, NODES)
    inside, between = find_busy_seconds(plan, counts)
    return {
        "imbalance": plan.imbalance_after,
        "tokens_gb": across.tokens[:, 0].sum() / 1e9,
        "lent_gb": across.experts[:, 0].sum() / 1e9,
        "busiest_gb": across.busiest / 1e9,
        "one_way_gb": across.busiest_link / 1e9,
        "inside": inside / between,
        "plan_us": statistics.median(seconds) * 1e6,
    }


def find_busy_seconds(plan: Plan, counts: np.ndarray) -> list[float]:
    """Of the busiest rank, how long its links inside the node, and between nodes, carry bytes."""
    lent = count_lending(plan, SHAPE.expert_weights, SHAPE.scatter_from, NODES)
    experts = np.sum([each.numbers for each in lent], axis=0)  # [2 links, 2, P]
    carried = 4 * SHAPE.token_bytes * count_tokens(plan, counts, NODES)
    carried += (SHAPE.weight_bytes + SHAPE.bytes_per_gradient) * experts
    links = MACHINE.intra_node, MACHINE.inter_node
    most = carried.max(axis=(1, 2)).tolist()
    return [n / link.bytes_per_second for n, link in zip(most, links, strict=True)]


def measure() -> list[dict[str, object]]:
    """A row for each case and method."""
    rows: list[dict[str, object]] = []
    cases = list(itertools.product((True, False), SIGMAS, TOKENS, RANKS))
    advance = start_progress(len(cases), "planning")
    for alike, sigma, tokens, ranks in cases:
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for seed in SEEDS:
            counts = route(ranks, tokens, sigma, alike, seed)
            plain: dict[str, float] = {}
            for method, options in METHODS.items():
                row = look_at(counts, options)
                plain = plain or row
                ratios = {f"{key}_of_plain": row[f"{key}_gb"] / plain[f"{key}_gb"] for key in WAYS}
                found[method].append(row | ratios)
        for method, of_method in found.items():
            figures = {
                key: statistics.median(row[key] for row in of_method) for key in of_method[0]
            }
            case = {"nodes_alike": alike, "sigma": sigma, "tokens": tokens, "ranks": ranks}
            rows.append(case | {"method": method} | figures)
        advance()
    return rows


def format_rows(rows: list[dict[str, object]]) -> str:
    """The table."""
    head = ["nodes", "sigma", "tokens", "EP", "method", "imbalance", "tokens GB", "experts GB"]
    head += ["busiest GB", "of plain's", "one way GB", "of plain's"]
    lines: list[list[object]] = [[*head, "inside", "plan us"]]
    for row in rows:
        figures = [f"{row['imbalance']:.2f}", f"{row['tokens_gb']:.1f}", f"{row['lent_gb']:.1f}"]
        for key in WAYS:
            figures += [f"{row[f'{key}_gb']:.2f}", f"{row[f'{key}_of_plain']:.2f}"]
        figures += [f"{row['inside']:.2f}", f"{row['plan_us']:.0f}"]
        nodes = "alike" if row["nodes_alike"] else "differ"
        lines.append([nodes, row["sigma"], row["tokens"], row["ranks"], row["method"], *figures])
    return format_table(lines, "<>>><>")


def main() -> None:
    """Count, print, write."""
    compile_planners()
    rows = measure()
    print(format_rows(rows))
    write_results(RESULTS, {"script": "benchmarks/nodes_table.py", "rows": rows})


if __name__ == "__main__":
    main()
