"""The picture of a comparison: panels in a grid, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_llep.offline.cli.plotting import import_pyplot
from megatron_llep.offline.compare.comparison import Comparison
from megatron_llep.offline.compare.panels import (
    FAINT,
    INK,
    Apart,
    BeforeAfter,
    OverSteps,
    OverTime,
    PhaseMark,
    StepTime,
)
from megatron_llep.offline.compare.rows import (
    LLEP_PREFIX,
    STEP_TIME,
    median_between,
    timed_steps,
)
from megatron_llep.offline.compare.run_log import RunLog

STYLE: dict[str, Any] = {
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


class Panel(Protocol):
    """What a picture is made of."""

    def draw(self, axes: Any) -> None:
        """Draw into the axes."""


def draw_picture(panels: Sequence[Panel], title: str, path: Path, *, columns: int = 3) -> None:
    """Write the PNG.

    Raises:
        ImportError: matplotlib is missing; says how to get it.
    """
    plt = import_pyplot()
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(6.2 * columns, 3.7 * rows + 0.5), layout="constrained"
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        cells = np.atleast_1d(grid).ravel()
        for panel, axes in zip(panels, cells, strict=False):
            panel.draw(axes)
        for axes in cells[len(panels) :]:
            axes.remove()
        figure.suptitle(title, fontsize=14, fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def metric_panels(
    comparison: Comparison, names: tuple[str, str], phases: Sequence[PhaseMark] = ()
) -> list[Panel]:
    """Of each metric: over steps, over wall time and, if it is judged, how far apart."""
    panels: list[Panel] = []
    for result in comparison.results:
        panels.append(OverSteps(result=result, names=names, phases=phases))
        panels.append(OverTime(result=result, names=names))
        if result.judgement is not None:
            panels.append(
                Apart(
                    judgement=result.judgement,
                    title=result.metric.title,
                    names=names,
                    phases=phases,
                )
            )
    return panels


def standard_panels(comparison: Comparison, names: tuple[str, str]) -> list[Panel]:
    """All panels of a comparison that need nothing but the logs."""
    panels = metric_panels(comparison, names)
    panels += load_panels(comparison.other)
    panels += step_time_panels(comparison, names)
    return panels


def load_panels(log: RunLog, phases: Sequence[PhaseMark] = ()) -> list[Panel]:
    """Imbalance and work of the most loaded rank, before and after; none of a plain run."""
    curves = [
        log.curves.get(f"{LLEP_PREFIX}{name}_{when}")
        for name in ("overload_factor", "max_tokens")
        for when in ("before", "after")
    ]
    if any(curve is None for curve in curves):
        return []
    before, after, most_before, most_after = (curve for curve in curves if curve is not None)
    return [
        BeforeAfter(
            title="Imbalance of the worst layer",
            ylabel="most loaded rank / mean",
            steps=before.steps,
            before=before.values,
            after=after.values,
            balanced=1,
            bottom=0.95,
            phases=phases,
        ),
        BeforeAfter(
            title="Work of the most loaded rank, worst layer",
            ylabel="(token, expert) pairs computed",
            steps=most_before.steps,
            before=most_before.values,
            after=most_after.values,
            balanced=float(np.median(most_before.values / before.values)),
            bottom=0,
            phases=phases,
        ),
    ]


def step_time_panels(
    comparison: Comparison, names: tuple[str, str], phases: Sequence[PhaseMark] = ()
) -> list[Panel]:
    """Megatron's time of each step, if both runs logged it; of phases the last one is timed."""
    reference, other = (
        run.curves.get(STEP_TIME) for run in (comparison.reference, comparison.other)
    )
    if reference is None or other is None:
        return []
    timed = timed_steps(reference, phases)
    return [
        StepTime(
            steps=(reference.steps, other.steps),
            seconds=(reference.values, other.values),
            medians=(median_between(reference, timed), median_between(other, timed)),
            timed=timed,
            names=names,
            phases=phases,
        )
    ]
