"""A picture of what a plan does to the ranks' loads.

Shape letters: P ranks, E experts.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_llep.offline.report.figure import import_pyplot, open_figure
from megatron_llep.planner import Plan


def draw_plan(plan: Plan, output: Path) -> None:
    """Draw loads before and after side by side; the format follows the file's suffix.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: matplotlib does not know the suffix.
    """
    plain = np.zeros_like(plan.quota)
    experts = np.arange(plan.num_experts)
    plain[experts, experts // plan.experts_per_rank] = plan.quota.sum(axis=1)
    lent = len(plan.transfers)
    panels = {
        f"expert parallelism: busiest rank {plan.imbalance_before:.2f} x mean": plain,
        f"LLEP: {plan.imbalance_after:.2f} x mean, {lent} experts lent (hatched)": plan.quota,
    }
    with open_figure(output, (9, 3.2), columns=2, sharey=True) as (_, axes):
        for panel, (title, quota) in zip(axes.flat, panels.items(), strict=True):
            _draw_loads(panel, quota, title)
        axes[0, 0].set_ylabel("tokens computed")


def _draw_loads(axes: Any, quota: np.ndarray, title: str) -> None:
    """Stack each rank's tokens by expert; experts of one home share a colour, lent ones a hatch."""
    E, P = quota.shape
    colors = import_pyplot().get_cmap("tab10")
    bottom = np.zeros(P)
    for expert in range(E):
        home = expert // (E // P)
        for rank in np.flatnonzero(quota[expert]):
            axes.bar(
                rank,
                quota[expert, rank],
                bottom=bottom[rank],
                color=colors(home % 10),
                edgecolor="white",
                linewidth=0.8 if E <= 64 else 0.2,
                hatch="///" if home != rank else None,
            )
            bottom[rank] += quota[expert, rank]
    axes.axhline(quota.sum() / P, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(title)
    if P <= 8:
        axes.set_xticks(range(P), [f"rank {rank}" if P <= 4 else str(rank) for rank in range(P)])
