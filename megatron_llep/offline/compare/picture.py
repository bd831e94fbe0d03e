"""The picture of a comparison: panels in a grid, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_llep.cli.plotting import import_pyplot
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
from megatron_llep.offline.compare.rows import LLEP_PREFIX, STEP_TIME, WARM_UP_STEPS

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
    before = comparison.other.curves.get(LLEP_PREFIX + "overload_factor_before")
    after = comparison.other.curves.get(LLEP_PREFIX + "overload_factor_after")
    if before is not None and after is not None:
        panels.append(
            BeforeAfter(
                title="Imbalance of the worst layer",
                ylabel="most loaded rank / mean",
                steps=before.steps,
                before=before.values,
                after=after.values,
                balanced=1,
                bottom=0.95,
            )
        )
    times = [run.curves.get(STEP_TIME) for run in (comparison.reference, comparison.other)]
    if times[0] is not None and times[1] is not None:
        first = min(curve.steps[min(WARM_UP_STEPS, curve.steps.size - 1)] for curve in times)
        last = max(curve.steps[-1] for curve in times)
        medians = [np.median(curve.values[curve.steps >= first]) for curve in times]
        panels.append(
            StepTime(
                steps=(times[0].steps, times[1].steps),
                seconds=(times[0].values, times[1].values),
                medians=(float(medians[0]), float(medians[1])),
                timed=(int(first), int(last)),
                names=names,
            )
        )
    return panels
