"""The picture of a comparison: panels in a grid, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_llep.offline.compare.comparison import Comparison
from megatron_llep.offline.compare.panels import (
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
from megatron_llep.offline.report.figure import open_figure


class Panel(Protocol):
    """What a picture is made of."""

    def draw(self, axes: Any) -> None:
        """Draw into the axes."""


def draw_picture(panels: Sequence[Panel], title: str, path: Path, *, columns: int = 3) -> None:
    """Write the PNG.

    Raises:
        ImportError: matplotlib is missing; says how to get it.
    """
    rows = -(-len(panels) // columns)
    size = (6.2 * columns, 3.7 * rows + 0.5)
    with open_figure(path, size, rows=rows, columns=columns) as (figure, grid):
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for panel, axes in zip(panels, grid.flat, strict=False):
            panel.draw(axes)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        figure.suptitle(title)


def metric_panels(comparison: Comparison, phases: Sequence[PhaseMark] = ()) -> list[Panel]:
    """Of each metric: over steps, over wall time and, if it is judged, how far apart."""
    names = comparison.names
    panels: list[Panel] = []
    for result in comparison.results:
        panels.append(OverSteps(result=result, names=names, phases=phases))
        panels.append(OverTime(result=result, names=names))
        if result.judgement is not None:
            title = result.metric.title
            panels.append(
                Apart(judgement=result.judgement, title=title, names=names, phases=phases)
            )
    return panels


def standard_panels(comparison: Comparison) -> list[Panel]:
    """All panels of a comparison that need nothing but the logs."""
    panels = metric_panels(comparison)
    panels += load_panels(comparison.other)
    panels += step_time_panels(comparison)
    return panels


def imbalance_panel(
    log: RunLog, title: str, stem: str, phases: Sequence[PhaseMark] = ()
) -> list[Panel]:
    """Most loaded rank / mean, logged as `STEM_before` and `STEM_after`; none where it was not."""
    before, after = (log.curves.get(f"{stem}_{when}") for when in ("before", "after"))
    if before is None or after is None:
        return []
    return [
        BeforeAfter(
            title=title,
            ylabel="most loaded rank / mean",
            steps=before.steps,
            before=before.values,
            after=after.values,
            balanced=1,
            bottom=0.95,
            phases=phases,
        )
    ]


def load_panels(log: RunLog, phases: Sequence[PhaseMark] = ()) -> list[Panel]:
    """Imbalance and work of the most loaded rank, before and after; none of a plain run."""
    stem = LLEP_PREFIX + "overload_factor"
    panels = imbalance_panel(log, "Imbalance of the worst layer", stem, phases)
    before, after = (log.curves.get(f"{LLEP_PREFIX}max_tokens_{w}") for w in ("before", "after"))
    if not panels or before is None or after is None:
        return []
    return [
        *panels,
        BeforeAfter(
            title="Work of the most loaded rank, worst layer",
            ylabel="(token, expert) pairs computed",
            steps=before.steps,
            before=before.values,
            after=after.values,
            balanced=float(np.median(before.values / log.curve(stem + "_before").values)),
            bottom=0,
            phases=phases,
        ),
    ]


def step_time_panels(comparison: Comparison, phases: Sequence[PhaseMark] = ()) -> list[Panel]:
    """Megatron's time of each step, if both runs logged it; of phases the last one is timed."""
    reference, other = (run.curves.get(STEP_TIME) for run in comparison.sides)
    if reference is None or other is None:
        return []
    timed = timed_steps(reference, phases)
    return [
        StepTime(
            steps=(reference.steps, other.steps),
            seconds=(reference.values, other.values),
            medians=(median_between(reference, timed), median_between(other, timed)),
            timed=timed,
            names=comparison.names,
            phases=phases,
        )
    ]
