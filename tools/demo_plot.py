"""The demo's picture: plain EP and LLEP side by side over the training steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from demo_measure import Curves
from demo_plan import Phase

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

PLAIN, LLEP, INK, FAINT = "#d1603d", "#1d6a96", "#333333", "#bbbbbb"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def draw(
    plain: Curves, llep: Curves, phases: Sequence[Phase], summary: dict[str, Any], path: Path
) -> None:
    """Write the PNG."""
    steps = np.arange(1, plain.loss.size + 1)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 11), layout="constrained")
        grid = figure.add_gridspec(3, 2)
        _draw_loss(figure.add_subplot(grid[0, 0]), steps, plain, llep, summary)
        _draw_imbalance(figure.add_subplot(grid[0, 1]), steps, llep)
        _draw_layers(figure, grid[1, 0], llep, phases)
        _draw_tokens(figure.add_subplot(grid[1, 1]), steps, llep)
        _draw_step_time(figure.add_subplot(grid[2, 0]), steps, plain, llep, summary)
        _draw_memory(figure.add_subplot(grid[2, 1]), summary)
        for axes in figure.axes:
            if axes.get_label() == "steps":
                _mark_phases(axes, phases)
        figure.suptitle(
            f"Plain expert parallelism and LLEP, same seed, same data  ({summary['layout']})",
            fontsize=14,
            fontweight="bold",
        )
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_loss(axes, steps, plain: Curves, llep: Curves, summary: dict[str, Any]) -> None:
    axes.set_label("steps")
    axes.plot(steps, plain.loss, color=PLAIN, linewidth=5, alpha=0.45, label="plain EP")
    axes.plot(steps, llep.loss, color=LLEP, linewidth=1.4, label="LLEP")
    difference = summary["loss_max_rel_diff"]
    axes.set(title=f"Loss: apart by at most {difference:.1e} of its value", ylabel="lm loss")
    axes.legend(loc="upper right")


def _draw_imbalance(axes, steps, llep: Curves) -> None:
    axes.set_label("steps")
    before, after = llep.llep["overload_factor_before"], llep.llep["overload_factor_after"]
    axes.fill_between(steps, after, before, color=PLAIN, alpha=0.12, linewidth=0)
    axes.plot(steps, before, color=PLAIN, label="before balancing (plain EP)")
    axes.plot(steps, after, color=LLEP, label="after (LLEP)")
    axes.axhline(1, color=FAINT, linewidth=1, linestyle=":")
    axes.set(title="Imbalance of the worst layer", ylabel="most loaded rank / mean")
    axes.set_ylim(bottom=0.95, top=max(1.2, before.max() * 1.12))
    axes.legend(loc="upper right", ncols=2)


def _draw_layers(figure, cell, llep: Curves, phases: Sequence[Phase]) -> None:
    rows = cell.subgridspec(2, 1)
    before = llep.llep["overload_factor_before_layers"]
    after = llep.llep["overload_factor_after_layers"]
    layers, steps = before.shape
    strips = []
    for row, values, title in (
        (0, before, "Imbalance of each layer, before balancing"),
        (1, after, "after"),
    ):
        axes = figure.add_subplot(rows[row])
        image = axes.imshow(
            values,
            aspect="auto",
            cmap="YlOrRd",
            vmin=1,
            vmax=before.max(),
            interpolation="nearest",
            extent=(0.5, steps + 0.5, layers + 0.5, 0.5),
        )
        axes.set_title(title)
        axes.set(ylabel="layer", yticks=range(1, layers + 1))
        for phase in phases[1:]:
            axes.axvline(phase.first_step - 0.5, color=INK, linewidth=0.8)
        strips.append(axes)
    strips[0].set_xticklabels([])
    strips[1].set_xlabel(_describe_steps(phases))
    figure.colorbar(image, ax=strips, pad=0.015, aspect=30)


def _draw_tokens(axes, steps, llep: Curves) -> None:
    axes.set_label("steps")
    before, after = llep.llep["max_tokens_before"], llep.llep["max_tokens_after"]
    axes.plot(steps, before, color=PLAIN, label="plain EP")
    axes.plot(steps, after, color=LLEP, label="LLEP")
    mean = before / llep.llep["overload_factor_before"]
    axes.axhline(np.median(mean), color=FAINT, linewidth=1, linestyle=":")
    axes.set(
        title="Work of the most loaded rank, worst layer", ylabel="(token, expert) pairs computed"
    )
    axes.set_ylim(0, before.max() * 1.15)
    axes.legend(loc="lower right", ncols=2)


def _draw_step_time(axes, steps, plain: Curves, llep: Curves, summary: dict[str, Any]) -> None:
    axes.set_label("steps")
    for curves, color, name, key in (
        (plain, PLAIN, "plain EP", "plain"),
        (llep, LLEP, "LLEP", "llep"),
    ):
        axes.plot(steps, curves.seconds, ".", color=color, markersize=4, alpha=0.35)
        median = summary["step_time_ms"][key] / 1e3
        first, last = summary["step_time_over_steps"]
        label = f"{name}, median {median:.2f} s"
        axes.hlines(median, first, last, color=color, linewidth=2.5, label=label)
    slowest = np.nanpercentile(np.concatenate([plain.seconds, llep.seconds]), 97)
    axes.set(title="Time of a step", ylabel="seconds", ylim=(0, slowest * 1.3))
    axes.legend(loc="upper right", ncols=2)


def _draw_memory(axes, summary: dict[str, Any]) -> None:
    peaks, steps = summary["peak_memory_mib"], summary["peak_memory_of_steps_mib"]
    names = {"plain": "plain EP", "llep": "LLEP"}
    for row, (kind, color) in enumerate((("llep", LLEP), ("plain", PLAIN))):
        peak, of_steps = peaks[kind], steps[kind]
        axes.barh(row, peak, color=color, height=0.55, alpha=0.85)
        text = f"  {peak:.0f} MiB"
        if of_steps is not None:
            axes.barh(row, peak - of_steps, color="white", alpha=0.45, height=0.55)
            text += f", {of_steps:.0f} of them by the steps"
        axes.text(peak, row, text, va="center")
    axes.set_yticks([0, 1], [names["llep"], names["plain"]])
    axes.set_xlim(0, max(peaks.values()) * 1.6)
    axes.set(title="Peak memory of the worst rank", xlabel="MiB above Python and its libraries")


def _mark_phases(axes, phases: Sequence[Phase]) -> None:
    for phase in phases[1:]:
        axes.axvline(phase.first_step - 0.5, color=FAINT, linewidth=1)
    axes.set_xlim(0.5, phases[-1].last_step + 0.5)
    axes.set_xlabel(_describe_steps(phases))


def _describe_steps(phases: Sequence[Phase]) -> str:
    parts = [f"{phase.name} to {phase.last_step}" for phase in phases]
    return f"step  ({', then '.join(parts)})"
