"""Arithmetic on curves: common steps, smoothing, difference, when a target is reached.

Letters: N logged values of a metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llep.offline.compare.run_log import Curve


def smooth_curve(curve: Curve, window: int) -> Curve:
    """Each value as the mean of itself and those before it, `window` in all or as many as exist."""
    if window == 1:
        return curve
    # Not by differences of one cumulative sum, in which a NaN would never end.
    padded = np.concatenate([np.full(window - 1, np.nan), curve.values])
    rows = np.lib.stride_tricks.sliding_window_view(padded, window)
    missing = np.arange(window) < (window - 1 - np.arange(len(rows)))[:, None]
    values = np.where(missing, 0, rows).sum(axis=1) / (~missing).sum(axis=1)
    return Curve(curve.steps, values, curve.seconds)


def common_steps(curves: Sequence[Curve]) -> np.ndarray:
    """Steps that all curves have, rising."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    return steps


def values_at(curve: Curve, steps: np.ndarray) -> np.ndarray:
    """Values at steps that the curve has."""
    return curve.values[np.searchsorted(curve.steps, steps)]


def difference(reference: np.ndarray, other: np.ndarray, *, absolute: bool) -> np.ndarray:
    """Signed difference [N] of other from reference, relative to the reference unless absolute.

    Where both are the same it is 0; where one is not finite, or the reference is 0 and the other
    is not, it is infinite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = other - reference
        result = apart if absolute else apart / np.abs(reference)
    result = np.where(np.isfinite(result), result, np.inf)
    return np.where((other == reference) & np.isfinite(reference), 0.0, result)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Where a curve first is at a target or beyond."""

    step: int
    seconds: float


def is_falling(curve: Curve) -> bool:
    """Whether a metric gets smaller by training: its last quarter is below its first."""
    finite = curve.values[np.isfinite(curve.values)]
    part = max(1, finite.size // 4)
    return bool(finite.size and finite[-part:].mean() < finite[:part].mean())


def find_target(curve: Curve, target: float, *, falling: bool) -> Reached | None:
    """First logged value at the target or beyond; None if there is none."""
    values = curve.values
    with np.errstate(invalid="ignore"):
        hits = np.flatnonzero(values <= target if falling else values >= target)
    if not hits.size:
        return None
    return Reached(step=int(curve.steps[hits[0]]), seconds=float(curve.seconds[hits[0]]))


def common_target(curves: Sequence[Curve], *, falling: bool) -> float | None:
    """The level that all curves end at or beyond: the worst of their means over the last tenth.

    None if one has no finite value.
    """
    finite = [curve.values[np.isfinite(curve.values)] for curve in curves]
    if not all(values.size for values in finite):
        return None
    ends = [float(values[-max(1, values.size // 10) :].mean()) for values in finite]
    return max(ends) if falling else min(ends)
