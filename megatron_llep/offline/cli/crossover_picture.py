"""Where lending pays: predicted speed-up over tokens, hidden size, ranks and bandwidth.

Each panel changes one thing of the same layer: 4,096 tokens a rank, 8 ranks of one node, hidden and
inner size 2880, 128 experts (1,024 in the panel over ranks, 8 ranks a node), 4 a token, H200 from
data sheets. As in the published LLEP benchmark a token may choose an expert several times.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_llep.offline.cli.routing import workload_counts
from megatron_llep.offline.nodes import make_topology
from megatron_llep.offline.report.figure import INK, METHODS, open_figure
from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.simulator.models import ModelShape
from megatron_llep.offline.simulator.run import Case, simulate
from megatron_llep.planner.cost.model import CostModel, LayerShape
from megatron_llep.planner.cost.presets import get_cost_model

SKEWS = {"hot-30-4": METHODS[0], "hot-80-4": METHODS[2], "hot-95-1": METHODS[3]}
"""With their colors."""
PLANNERS = {"exact": "-", "auto": ":"}
"""With their line styles."""
TOKENS, RANKS = 4096, 8
SHAPE = LayerShape(hidden=2880, ffn_hidden=2880, num_experts=128, top_k=4)
COST = get_cost_model("h200")

Point = tuple[float, int, int, LayerShape, CostModel]
"""Place on the axis, tokens, ranks, layer, machine."""


def change_hidden(size: int) -> Point:
    """The inner size is the hidden size."""
    shape = dataclasses.replace(SHAPE, hidden=size, ffn_hidden=size)
    return size, TOKENS, RANKS, shape, COST


def change_bandwidth(gigabytes: int) -> Point:
    """Of each rank, each way, in GB/s; for tokens and experts alike."""
    link = dataclasses.replace(COST.intra_node, bytes_per_second=gigabytes * 1e9)
    return gigabytes, TOKENS, RANKS, SHAPE, dataclasses.replace(COST, intra_node=link)


MANY = dataclasses.replace(SHAPE, num_experts=1024)
"""As many experts as the largest group has ranks."""
PANELS: dict[str, list[Point]] = {
    # From what fits into a decoding step to what fits into memory.
    "tokens a rank": [(2**i, 2**i, RANKS, SHAPE, COST) for i in range(6, 18)],
    "hidden size": [change_hidden(n) for n in (256, 512, 1024, 2048, 2880, 4096, 7168, 12288)],
    "ranks (EP size)": [(2**i, TOKENS, 2**i, MANY, COST) for i in range(1, 11)],
    "GB/s of a rank, each way": [change_bandwidth(n) for n in (5, 10, 25, 50, 100, 200, 450, 900)],
}


def predict_speedups(point: Point, skew: str) -> dict[str, float]:
    """Layer time under plain EP / under each planner."""
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
    outcomes = simulate(case, ("plain", *PLANNERS))
    plain = outcomes["plain"].layer.total
    return {planner: plain / outcomes[planner].layer.total for planner in PLANNERS}


def draw_panel(
    axes: Any, title: str, points: list[Point], advance: Callable[[], None] = lambda: None
) -> None:
    """Speed-up over the axis; `advance` is called after each prediction."""
    x = [point[0] for point in points]
    for skew, color in SKEWS.items():
        speedups = []
        for point in points:
            speedups.append(predict_speedups(point, skew))
            advance()
        for planner, style in PLANNERS.items():
            y = [speedup[planner] for speedup in speedups]
            axes.plot(x, y, style, color=color, marker=".", label=f"{skew}, {planner}")
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_xscale("log", base=2 if title != "hidden size" else 10)
    axes.set_yscale("log")
    top = 9 if title == "ranks (EP size)" else 5
    y = [2.0**power for power in range(-1, top)]
    axes.set_yticks(y, [f"{tick:g}" for tick in y])
    axes.set_xticks(x, [f"{tick:g}" for tick in x], rotation=45, fontsize=8)
    axes.set_ylim(0.25, y[-1])
    axes.minorticks_off()
    axes.set_xlabel(title)


def draw_crossover(output: Path) -> None:
    """Draw all panels; the suffix of the file says the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    advance = start_progress(len(SKEWS) * sum(map(len, PANELS.values())), "simulating")
    with open_figure(output, (10, 7), rows=2, columns=2) as (figure, axes):
        for panel, (title, points) in zip(axes.flat, PANELS.items(), strict=True):
            draw_panel(panel, title, points, advance)
        axes[0, 0].legend(fontsize=8)
        figure.supylabel("predicted layer time, plain EP / method", fontsize=10)
