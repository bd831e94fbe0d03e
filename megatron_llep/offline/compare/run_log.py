"""What one training run logged, over steps and over the wall time of training.

Letters: N logged values of a metric.

How wall time is counted. A session is one process's log. Its clock starts with the first value it
logged for a training step: start-up and the first step, which builds caches, are outside, and
values logged before that are at 0. Sessions of one run follow each other without a gap, so that the
time between them (saving, ending, starting, loading) is outside too. What happens between two
logged steps is inside: evaluation, rollouts, saving on the way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Curve:
    """One metric: steps [N] (rising), values [N], seconds [N] of training since the run's start."""

    steps: np.ndarray
    values: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True)
class Session:
    """The log of one process, as read: metric -> rows of (step, value, time), in logged order.

    Times are seconds of the machine's clock; `folder` is where the file is.
    """

    folder: Path
    rows: Mapping[str, np.ndarray]  # [N, 3], float64

    @property
    def start(self) -> float:
        """Time of the first value logged for a training step, i.e. a step above 0."""
        rows = np.concatenate(list(self.rows.values()))
        steps = rows[rows[:, 0] > 0]
        return float((steps if steps.size else rows)[:, 2].min())


@dataclass(frozen=True)
class RunLog:
    """All that a run logged: `name` for people, `source` where it was read, metric -> curve."""

    name: str
    source: str
    curves: Mapping[str, Curve]

    def curve(self, metric: str) -> Curve:
        """One metric.

        Raises:
            ValueError: it was not logged; names those that were.
        """
        if metric not in self.curves:
            raise ValueError(
                f"{self.name} ({self.source}) logged no {metric!r}; it has: "
                f"{', '.join(sorted(self.curves))}"
            )
        return self.curves[metric]

    @property
    def last_step(self) -> int:
        """The last step of any metric."""
        return max(int(curve.steps[-1]) for curve in self.curves.values())

    @property
    def seconds(self) -> float:
        """Wall time of training up to the last value."""
        return max(float(curve.seconds[-1]) for curve in self.curves.values())

    def stacked(self, stem: str) -> np.ndarray | None:
        """Metrics `STEM_layer_0`, `STEM_layer_1`, ... as [L, N]; None if there are none."""
        layers = {}
        for metric, curve in self.curves.items():
            found, _, layer = metric.rpartition("_layer_")
            if found == stem and layer.isdigit():
                layers[int(layer)] = curve.values
        return np.stack([layers[layer] for layer in sorted(layers)]) if layers else None


def join_sessions(sessions: Sequence[Session], name: str, source: str) -> RunLog:
    """Join the sessions of one run, in the order in which they began.

    Megatron's `NAME vs samples` are left out: what they count as steps are samples.

    A session in the folder of an earlier one resumes it: from its first step on, per metric, its
    values count. Sessions in different folders are phases: their steps must follow each other.

    Raises:
        ValueError: nothing was logged, or folders hold the same steps, so they are several runs.
    """
    sessions = [replace(each, rows=_without_samples(each.rows)) for each in sessions]
    sessions = sorted((each for each in sessions if each.rows), key=lambda each: each.start)
    if not sessions:
        raise ValueError(f"{name} ({source}): the log has no scalar in it")
    kept: dict[str, np.ndarray] = {}
    owners: dict[str, Path] = {}
    for session in sessions:
        for metric, rows in session.rows.items():
            first = rows[:, 0].min()
            before = kept.get(metric)
            if before is not None and before[-1, 0] >= first and owners[metric] != session.folder:
                raise ValueError(
                    f"{source}: {owners[metric]} and {session.folder} both have step {first:.0f} "
                    f"of {metric!r}, so they are different runs; give the folder of one of them"
                )
            if before is not None:
                kept[metric] = before[before[:, 0] < first]
            owners[metric] = session.folder
        offset = max((float(rows[-1, 2]) for rows in kept.values() if len(rows)), default=0.0)
        for metric, rows in session.rows.items():
            clock = rows.copy()
            clock[:, 2] = offset + np.maximum(rows[:, 2] - session.start, 0)
            parts = [kept[metric], _last_of_each_step(clock)] if metric in kept else [clock]
            kept[metric] = _last_of_each_step(np.concatenate(parts))
    return RunLog(name, source, {metric: _to_curve(rows) for metric, rows in kept.items()})


def _without_samples(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {metric: each for metric, each in rows.items() if not metric.endswith(" vs samples")}


def _last_of_each_step(rows: np.ndarray) -> np.ndarray:
    """Sort by step; of a step that was logged twice the later value stays."""
    _, first_of_reversed = np.unique(rows[::-1, 0], return_index=True)
    return rows[::-1][first_of_reversed]


def _to_curve(rows: np.ndarray) -> Curve:
    return Curve(rows[:, 0].astype(np.int64), rows[:, 1].copy(), rows[:, 2].copy())
