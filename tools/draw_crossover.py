"""Draw where lending pays: predicted speed-up over tokens, hidden size, ranks and bandwidth.

python tools/draw_crossover.py --output docs/crossover.svg

Each panel changes one thing of the same layer: 4,096 tokens a rank, 8 ranks of one node, hidden and
inner size 2880, 128 experts (1,024 in the panel over ranks, 8 ranks a node), 4 a token, H200 from
data sheets. As in the published LLEP benchmark a token may choose an expert several times.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_llep.offline.cli.plotting import import_pyplot, save_figure, start_progress
from megatron_llep.offline.cli.routing import make_topology, workload_counts
from megatron_llep.offline.simulator import Case, ModelShape, simulate
from megatron_llep.planner.cost.model import CostModel, LayerShape, Link
from megatron_llep.planner.cost.presets import get_cost_model

SKEWS = ("hot-30-4", "hot-80-4", "hot-95-1")
METHODS = ("exact", "auto")
TOKENS, RANKS = 4096, 8
SHAPE = LayerShape(hidden=2880, ffn_hidden=2880, num_experts=128, top_k=4)
COST = get_cost_model("h200")

Point = tuple[float, int, int, LayerShape, CostModel]
"""Place on the axis, tokens, ranks, layer, machine."""


def change_tokens() -> Iterator[Point]:
    """From what fits into a decoding step to what fits into memory."""
    for power in range(6, 18):
        yield 2**power, 2**power, RANKS, SHAPE, COST


def change_hidden() -> Iterator[Point]:
    """The inner size is the hidden size."""
    for hidden in (256, 512, 1024, 2048, 2880, 4096, 7168, 12288):
        shape = dataclasses.replace(SHAPE, hidden=hidden, ffn_hidden=hidden)
        yield hidden, TOKENS, RANKS, shape, COST


def change_ranks() -> Iterator[Point]:
    """Nodes of 8 ranks; as many experts as the largest group has ranks."""
    shape = dataclasses.replace(SHAPE, num_experts=1024)
    for power in range(1, 11):
        yield 2**power, TOKENS, 2**power, shape, COST


def change_bandwidth() -> Iterator[Point]:
    """Of each rank, each way, in GB/s; for tokens and experts alike."""
    for bandwidth in (5, 10, 25, 50, 100, 200, 450, 900):
        link = Link(
            latency_seconds=COST.intra_node.latency_seconds, bytes_per_second=bandwidth * 1e9
        )
        yield bandwidth, TOKENS, RANKS, SHAPE, dataclasses.replace(COST, intra_node=link)


PANELS = {
    "tokens a rank": change_tokens,
    "hidden size": change_hidden,
    "ranks (EP size)": change_ranks,
    "GB/s of a rank, each way": change_bandwidth,
}


def predict_speedups(point: Point, skew: str) -> dict[str, float]:
    """Layer time under plain EP / under each method."""
    _, tokens, ranks, shape, cost = point
    counts = workload_counts(
        skew,
        num_ranks=ranks,
        num_experts=shape.num_experts,
        tokens=tokens,
        top_k=shape.top_k,
        seed=0,
        repeat_experts=True,
    )
    case = Case(
        model=ModelShape(name="layer", moe_layers=1, layer=shape, other_flops_per_token=0.0),
        cost=cost,
        topology=make_topology(8, ranks),
        make_counts=counts,
    )
    outcomes = simulate(case, ("plain", *METHODS))
    plain = outcomes["plain"].layer.total
    return {method: plain / outcomes[method].layer.total for method in METHODS}


def draw_panel(axes: Any, title: str, points: list[Point], advance: Any) -> None:
    """Speed-up over the axis: a colour for each skew, a line style for each method."""
    for color, skew in enumerate(SKEWS):
        speedups = []
        for point in points:
            speedups.append(predict_speedups(point, skew))
            advance()
        for method, style in zip(METHODS, ("-", ":"), strict=True):
            axes.plot(
                [point[0] for point in points],
                [speedup[method] for speedup in speedups],
                style,
                color=f"C{color}",
                marker=".",
                label=f"{skew}, {method}",
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2 if title != "hidden size" else 10)
    axes.set_yscale("log")
    top = 8 if title == "ranks (EP size)" else 5
    ticks = [2.0**power for power in range(-1, top)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(0.25, 2.0 ** (top - 1))
    axes.minorticks_off()
    ticks = [point[0] for point in points]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45, fontsize=8)
    axes.set_xlabel(title)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw all panels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="an .svg or .png file")
    args = parser.parse_args()
    panels = {title: list(points()) for title, points in PANELS.items()}
    advance = start_progress(len(SKEWS) * sum(map(len, panels.values())), "simulating")
    plt = import_pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for panel, (title, points) in zip(axes.flat, panels.items(), strict=True):
        draw_panel(panel, title, points, advance)
    axes[0, 0].legend(fontsize=8)
    figure.supylabel("predicted layer time, plain EP / method", fontsize=10)
    save_figure(figure, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
