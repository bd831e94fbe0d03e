"""Rows of the table that Megatron's and LLEP's own metrics give, where they were logged."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llep.offline.compare.comparison import Comparison
from megatron_llep.offline.compare.run_log import Curve, RunLog
from megatron_llep.offline.compare.table import Row, format_ratio, metric_rows

LLEP_PREFIX = "moe/llep/"
STEP_TIME = "iteration-time"
PEAK_MEMORY = "peak-memory-worst-rank-bytes"
WARM_UP_STEPS = 5
"""First steps of a phase, left out of the step times: allocators and caches still grow."""


@dataclass(frozen=True)
class PhaseMark:
    """A part of the training with a name."""

    name: str
    first_step: int
    last_step: int


def standard_rows(comparison: Comparison) -> list[Row]:
    """All figures of a comparison that need nothing but the logs."""
    rows = [row for result in comparison.results for row in metric_rows(result)]
    reference, other = comparison.sides
    found = (
        ("wall time of training", "{:.1f} s", lambda run, _: run.seconds),
        ("step time, median", "{:.0f} ms", _step_time),
        ("imbalance, worst layer, median", "{:.2f}", _imbalance),
        ("imbalance, worst step and layer", "{:.2f}", _worst_imbalance),
        ("peak memory of the worst rank", "{:.0f} MiB", _peak),
    )
    for title, form, measure in found:
        first, second = measure(reference, other), measure(other, reference)
        if first is not None and second is not None:  # both logged it
            rows.append(pair_row(title, (first, second), form))
    return rows


def pair_row(
    title: str, pair: tuple[float, float], form: str = "{:.2f}", note: str | None = None
) -> Row:
    """A figure of both runs, shown as `form` says; the note is their ratio if none is given."""
    reference, other = pair
    told = format_ratio(reference, other) if note is None else note
    return title, form.format(reference), form.format(other), told


def timed_steps(curve: Curve, phases: Sequence[PhaseMark] = ()) -> tuple[int, int]:
    """First and last step whose time counts: of the last phase, without its warm-up."""
    first = phases[-1].first_step if phases else int(curve.steps[0])
    last = phases[-1].last_step if phases else int(curve.steps[-1])
    return min(first + WARM_UP_STEPS, last), last


def median_between(curve: Curve, steps: tuple[int, int]) -> float:
    """Median over the steps from first to last; of all where none of them was logged."""
    inside = (curve.steps >= steps[0]) & (curve.steps <= steps[1])
    return float(np.median(curve.values[inside] if inside.any() else curve.values))


def _step_time(run: RunLog, _: RunLog) -> float | None:
    curve = run.curves.get(STEP_TIME)
    return None if curve is None else median_between(curve, timed_steps(curve)) * 1e3


def imbalance_of(run: RunLog, peer: RunLog) -> np.ndarray | None:
    """Most loaded rank / mean, worst layer, over steps; None if unknown.

    A plain run does not log it: what the routing of its peer asks for before balancing stands for
    it, which is the same as long as both agree.
    """
    for log, name in ((run, "overload_factor_after"), (peer, "overload_factor_before")):
        if LLEP_PREFIX + name in log.curves:
            return log.curves[LLEP_PREFIX + name].values
    return None


def _imbalance(run: RunLog, peer: RunLog) -> float | None:
    values = imbalance_of(run, peer)
    return None if values is None else float(np.median(values))


def _worst_imbalance(run: RunLog, peer: RunLog) -> float | None:
    values = imbalance_of(run, peer)
    return None if values is None else float(values.max())


def _peak(run: RunLog, _: RunLog) -> float | None:
    curve = run.curves.get(PEAK_MEMORY)
    return None if curve is None else float(curve.values.max()) / 2**20
