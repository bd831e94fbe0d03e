"""A picture of what a plan does to the ranks' loads.

Shape letters: P ranks, E experts.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_llep.offline.cli.plotting import import_pyplot, save_figure
from megatron_llep.planner import Plan


def draw_plan(plan: Plan, output: Path) -> None:
    """Draw loads before and after side by side; the format follows the file's suffix.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: matplotlib does not know the suffix.
    """
    plt = import_pyplot()
    plain = np.zeros_like(plan.quota)
    experts = np.arange(plan.num_experts)
    plain[experts, experts // plan.experts_per_rank] = plan.quota.sum(axis=1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    _draw_loads(left, plain, f"expert parallelism: busiest rank {plan.imbalance_before:.2f} x mean")
    _draw_loads(
        right,
        plan.quota,
        f"LLEP: {plan.imbalance_after:.2f} x mean, {len(plan.transfers)} experts lent (hatched)",
    )
    left.set_ylabel("tokens computed")
    save_figure(figure, output)


def _draw_loads(axes: Any, quota: np.ndarray, title: str) -> None:
    """Stack each rank's tokens by expert; experts of one home share a colour, lent ones a hatch."""
    E, P = quota.shape
    plt = import_pyplot()
    bottom = np.zeros(P)
    for expert in range(E):
        home = expert // (E // P)
        for rank in np.flatnonzero(quota[expert]):
            axes.bar(
                rank,
                quota[expert, rank],
                bottom=bottom[rank],
                color=plt.get_cmap("tab10")(home % 10),
                edgecolor="white",
                linewidth=0.8 if E <= 64 else 0.2,
                hatch="///" if home != rank else None,
            )
            bottom[rank] += quota[expert, rank]
    axes.axhline(quota.sum() / P, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(title, fontsize=10)
    if P <= 8:
        axes.set_xticks(range(P), [f"rank {rank}" if P <= 4 else str(rank) for rank in range(P)])
    axes.spines[["top", "right"]].set_visible(False)
