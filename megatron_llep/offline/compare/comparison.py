"""The comparison of two runs: metrics judged, targets reached, one verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_llep.offline.compare.curves import (
    Reached,
    common_target,
    find_target,
    is_falling,
    smooth_curve,
)
from megatron_llep.offline.compare.run_log import Curve, RunLog
from megatron_llep.offline.compare.verdict import Judgement, Tolerance, judge

RACE_PART = 20
"""A target counts as reached once the mean of the last 1/20 of all values is there."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric to compare, by the name it is logged under.

    label: for people; default: the name.
    tolerance: what is allowed between the runs; None: drawn and timed, not judged.
    target: the time to reach it is compared; None: the level at which both runs end.
    smooth: each value counts as the mean of so many, itself and those before it; for metrics that
        jump, as the reward of a few samples does.
    """

    name: str
    label: str = ""
    tolerance: Tolerance | None = field(default_factory=Tolerance)
    target: float | None = None
    smooth: int = 1

    def __post_init__(self) -> None:
        if self.smooth < 1:
            raise ValueError(f"smooth {self.smooth} of {self.name!r}: give 1 or more values")

    @property
    def title(self) -> str:
        """For people."""
        return self.label or self.name


@dataclass(frozen=True, kw_only=True)
class Race:
    """Who reaches a target first: `reference` and `other` are None where they do not."""

    target: float
    falling: bool
    reference: Reached | None
    other: Reached | None

    @property
    def speedup(self) -> float | None:
        """Wall time of the reference / that of the other; None if one does not arrive."""
        if self.reference is None or self.other is None or self.other.seconds <= 0:
            return None
        return self.reference.seconds / self.other.seconds


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """One metric of both runs (and the control), smoothed as the metric says."""

    metric: Metric
    reference: Curve
    other: Curve
    control: Curve | None
    judgement: Judgement | None
    race: Race | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs, what was found about each metric."""

    reference: RunLog
    other: RunLog
    control: RunLog | None
    results: tuple[MetricResult, ...]

    @property
    def sides(self) -> tuple[RunLog, RunLog]:
        """Both runs, the reference first."""
        return self.reference, self.other

    @property
    def names(self) -> tuple[str, str]:
        """Of both runs, for people."""
        return self.reference.name, self.other.name

    @property
    def judgements(self) -> tuple[Judgement, ...]:
        """Of the metrics that are judged."""
        return tuple(each.judgement for each in self.results if each.judgement is not None)

    @property
    def agree(self) -> bool:
        """Whether every judged metric keeps its bounds."""
        return all(judgement.agree for judgement in self.judgements)

    def result(self, name: str) -> MetricResult:
        """Of one metric."""
        return next(each for each in self.results if each.metric.name == name)

    def describe(self) -> dict[str, Any]:
        """All figures, for JSON."""
        control = None if self.control is None else _describe_run(self.control)
        return {
            "agree": self.agree,
            "runs": {
                "reference": _describe_run(self.reference),
                "other": _describe_run(self.other),
            },
            "control": control,
            "metrics": {each.metric.name: _describe_result(each) for each in self.results},
        }


def compare_runs(
    reference: RunLog,
    other: RunLog,
    metrics: Sequence[Metric],
    *,
    control: RunLog | None = None,
    only_common: bool = False,
) -> Comparison:
    """Hold one run against another.

    Args:
        reference: plain expert parallelism, say.
        other: the run in question, LLEP.
        metrics: what to compare, at least one of them with a tolerance.
        control: the reference again, in another order of summation or with another seed.
        only_common: judge the steps that all runs have, where some are shorter.

    Raises:
        ValueError: a metric was not logged, no step is common, or the control is unusable.
    """
    if not any(metric.tolerance for metric in metrics):
        raise ValueError("no metric has a tolerance: there is nothing to judge the runs by")
    results = []
    for metric in metrics:
        first = smooth_curve(reference.curve(metric.name), metric.smooth)
        second = smooth_curve(other.curve(metric.name), metric.smooth)
        third = None
        if control is not None and metric.tolerance:
            third = smooth_curve(control.curve(metric.name), metric.smooth)
        judgement = None
        if metric.tolerance:
            judgement = judge(
                metric.name,
                first,
                second,
                third,
                metric.tolerance,
                names=(reference.name, other.name),
                only_common=only_common,
            )
        results.append(
            MetricResult(
                metric=metric,
                reference=first,
                other=second,
                control=third,
                judgement=judgement,
                race=_race(metric, first, second),
            )
        )
    return Comparison(reference=reference, other=other, control=control, results=tuple(results))


def _race(metric: Metric, reference: Curve, other: Curve) -> Race | None:
    # One lucky batch is no arrival.
    window = max(1, min(reference.steps.size, other.steps.size) // RACE_PART)
    reference, other = smooth_curve(reference, window), smooth_curve(other, window)
    target = metric.target
    if target is None:
        falling = is_falling(reference)
        target = common_target([reference, other], falling=falling)
        if target is None:
            return None
    else:
        falling = bool(reference.values[0] > target)
    return Race(
        target=target,
        falling=falling,
        reference=find_target(reference, target, falling=falling),
        other=find_target(other, target, falling=falling),
    )


def _describe_run(run: RunLog) -> dict[str, Any]:
    return {
        "name": run.name,
        "source": run.source,
        "last_step": run.last_step,
        "seconds": run.seconds,
    }


def _describe_result(result: MetricResult) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "smooth": result.metric.smooth,
        "last": {
            "reference": float(result.reference.values[-1]),
            "other": float(result.other.values[-1]),
        },
    }
    if result.race is not None:
        race = result.race
        figures["target"] = {
            "value": race.target,
            "given": result.metric.target is not None,
            "reached_when": "at or below" if race.falling else "at or above",
            "speedup": race.speedup,
            "reference": _describe_reached(race.reference),
            "other": _describe_reached(race.other),
        }
    if result.judgement is not None:
        found = result.judgement
        figures |= {
            "agree": found.agree,
            "difference": "absolute" if found.tolerance.absolute else "relative to the reference",
            "steps": int(found.steps.size),
            "gap": found.gap,
            "checks": [
                {"name": c.name, "value": c.value, "allowed": c.allowed, "ok": c.ok}
                for c in found.checks
            ],
            "control_factor": found.factor,
            "control_largest_difference": None
            if found.control is None
            else float(np.max(found.control)),
        }
    return figures


def _describe_reached(reached: Reached | None) -> dict[str, float] | None:
    return None if reached is None else {"step": reached.step, "seconds": reached.seconds}
