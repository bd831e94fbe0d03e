"""The panels of a comparison's picture: each draws itself into matplotlib axes.

Letters: L layers, N logged values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_llep.offline.compare.comparison import MetricResult, Race
from megatron_llep.offline.compare.rows import PhaseMark
from megatron_llep.offline.compare.verdict import Judgement
from megatron_llep.offline.report.figure import BAD, CONTROL, FAINT, INK, LLEP, PLAIN


@dataclass(frozen=True, kw_only=True)
class OverSteps:
    """A metric of both runs, and of the control, over steps."""

    result: MetricResult
    names: tuple[str, str]
    phases: Sequence[PhaseMark] = ()

    def draw(self, axes: Any) -> None:
        """Draw it."""
        result = self.result
        if result.control is not None:
            curve = result.control
            axes.plot(curve.steps, curve.values, "--", color=CONTROL, lw=1, label="control")
        _plot_sides(axes, result, self.names, "steps")
        title = f"{result.metric.title} over steps"
        if result.metric.smooth > 1:
            title += f" (mean of {result.metric.smooth})"
        axes.set(title=title, ylabel=result.metric.title)
        _mark_phases(axes, self.phases)
        axes.legend()


@dataclass(frozen=True, kw_only=True)
class OverTime:
    """A metric of both runs over the wall time of training, with who reaches the target when."""

    result: MetricResult
    names: tuple[str, str]

    def draw(self, axes: Any) -> None:
        """Draw it."""
        result = self.result
        _plot_sides(axes, result, self.names, "seconds")
        axes.set(
            title=f"{result.metric.title} over wall time",
            xlabel="seconds of training",
            ylabel=result.metric.title,
        )
        axes.set_xlim(left=0)
        if result.race is not None:
            self._mark_race(axes, result.race)
        axes.legend()

    def _mark_race(self, axes: Any, race: Race) -> None:
        axes.axhline(race.target, color=FAINT, lw=1, ls=":")
        for reached, color in ((race.reference, PLAIN), (race.other, LLEP)):
            if reached is not None:
                axes.plot(
                    reached.seconds, race.target, "o", color=color, ms=7, mec="white", zorder=5
                )
        if race.speedup is not None:
            faster = race.speedup if race.speedup >= 1 else 1 / race.speedup
            word = "sooner" if race.speedup >= 1 else "later"
            where = f"{self.names[1]} is at {race.target:.3g}"
            title = self.result.metric.title
            axes.set_title(f"{title} over wall time: {where} {faster:.2f}x {word}")


@dataclass(frozen=True, kw_only=True)
class Apart:
    """How far two curves are apart, with what is allowed and what the control shows."""

    judgement: Judgement
    title: str
    names: tuple[str, str]
    phases: Sequence[PhaseMark] = ()

    def draw(self, axes: Any) -> None:
        """Draw it."""
        found = self.judgement
        kind = "absolute" if found.tolerance.absolute else "relative"
        axes.set_yscale("log")
        finite = found.apart[np.isfinite(found.apart)]
        top = 3 * max(found.allowed.max(), finite.max(initial=0))
        drawn = np.clip(found.apart, None, top / 2)
        seen = drawn if found.control is None else np.concatenate([drawn, found.control])
        lowest = seen[seen > 0].min(initial=found.allowed.min() / 10)
        forbidden = {"color": BAD, "alpha": 0.07, "lw": 0, "step": "mid"}
        axes.fill_between(found.steps, found.allowed, top, **forbidden)
        axes.step(found.steps, found.allowed, where="mid", color=BAD, lw=1, label="allowed")
        if found.control is not None:
            _plot_growth(axes, found.steps, found.control, CONTROL, "control")
        _plot_growth(axes, found.steps, drawn, LLEP, self.names[1])
        axes.set_ylim(lowest / 3, top)
        word = "within what is allowed" if found.agree else "MORE THAN IS ALLOWED"
        if not found.apart.any():
            word = "no difference"
        axes.set_title(f"{self.title}: {word}", color=INK if found.agree else BAD)
        axes.set_ylabel(f"{kind} difference from {self.names[0]}")
        _mark_phases(axes, self.phases)
        axes.legend(loc="best")


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """A figure of load before balancing and after, both [N]; `balanced` is where it is best."""

    title: str
    ylabel: str
    steps: np.ndarray
    before: np.ndarray
    after: np.ndarray
    balanced: float
    bottom: float
    phases: Sequence[PhaseMark] = ()

    def draw(self, axes: Any) -> None:
        """Draw it."""
        axes.fill_between(self.steps, self.after, self.before, color=PLAIN, alpha=0.12, lw=0)
        axes.plot(self.steps, self.before, color=PLAIN, label="before balancing")
        axes.plot(self.steps, self.after, color=LLEP, label="after (LLEP)")
        axes.axhline(self.balanced, color=FAINT, lw=1, ls=":")
        axes.set(title=self.title, ylabel=self.ylabel)
        axes.set_ylim(self.bottom, max(1.1 * self.balanced, self.before.max() * 1.15))
        _mark_phases(axes, self.phases)
        axes.legend(loc="upper right", ncols=2)


@dataclass(frozen=True, kw_only=True)
class LayersBeforeAfter:
    """The same of each layer, both [L, N], as two strips of color."""

    title: str
    steps: np.ndarray
    before: np.ndarray
    after: np.ndarray
    phases: Sequence[PhaseMark] = ()

    def draw(self, axes: Any) -> None:
        """Draw it."""
        layers, count = self.before.shape
        gap = max(1, round(0.4 * layers))
        rows = np.concatenate([self.before, np.full((gap, count), np.nan), self.after])
        edges = (self.steps[0] - 0.5, self.steps[-1] + 0.5, len(rows) - 0.5, -0.5)
        image = axes.imshow(
            rows,
            aspect="auto",
            cmap="YlOrRd",
            vmin=1,
            vmax=max(1.01, self.before.max()),
            interpolation="nearest",
            extent=edges,
        )
        shown = range(0, layers, max(1, layers // 8))
        ticks = [*shown, *(layers + gap + row for row in shown)]
        labels = [f"{part} {row + 1}" for part in ("before", "after") for row in shown]
        axes.set_yticks(ticks, labels)
        axes.set_title(self.title)
        _mark_phases(axes, self.phases)
        scale = axes.inset_axes((0.6, 0.5, 0.38, 0.04))  # in the gap
        axes.figure.colorbar(image, cax=scale, orientation="horizontal")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of each step as dots, and the median of the steps `timed` (first, last) as a line."""

    steps: tuple[np.ndarray, np.ndarray]
    seconds: tuple[np.ndarray, np.ndarray]
    medians: tuple[float, float]
    timed: tuple[int, int]
    names: tuple[str, str]
    phases: Sequence[PhaseMark] = ()

    def draw(self, axes: Any) -> None:
        """Draw it."""
        for side, color in enumerate((PLAIN, LLEP)):
            axes.plot(self.steps[side], self.seconds[side], ".", color=color, ms=4, alpha=0.35)
            label = f"{self.names[side]}, median {self.medians[side]:.3g} s"
            axes.hlines(self.medians[side], *self.timed, color=color, lw=2.5, label=label)
        slowest = np.nanpercentile(np.concatenate(self.seconds), 97)
        axes.set(title="Time of a step", ylabel="seconds", ylim=(0, slowest * 1.4))
        _mark_phases(axes, self.phases)
        axes.legend(loc="upper right")


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A figure of each run as a bar, and a part of it, None where it is unknown."""

    title: str
    unit: str
    xlabel: str
    values: tuple[float, float]
    parts: tuple[float | None, float | None]
    part_note: str
    names: tuple[str, str]

    def draw(self, axes: Any) -> None:
        """Draw it."""
        for row, side in enumerate((1, 0)):
            value, part = self.values[side], self.parts[side]
            axes.barh(row, value, color=(PLAIN, LLEP)[side], height=0.55, alpha=0.85)
            text = f"  {value:.0f} {self.unit}"
            if part is not None:
                axes.barh(row, value - part, color="white", alpha=0.45, height=0.55)
                text += f", {part:.0f} of them {self.part_note}"
            axes.text(value, row, text, va="center")
        axes.set_yticks([0, 1], [self.names[1], self.names[0]])
        axes.set_xlim(0, max(self.values) * 1.75)
        axes.set(title=self.title, xlabel=self.xlabel)


def _plot_sides(axes: Any, result: MetricResult, names: tuple[str, str], over: str) -> None:
    """Both runs over their `steps` or `seconds`: the second is to be seen on top of the first."""
    marker = "o" if result.reference.steps.size < 25 else None
    for curve, name, style in (
        (result.reference, names[0], {"color": PLAIN, "lw": 5, "alpha": 0.45}),
        (result.other, names[1], {"color": LLEP, "lw": 1.4}),
    ):
        axes.plot(getattr(curve, over), curve.values, label=name, marker=marker, ms=4, **style)


def _plot_growth(axes: Any, steps: np.ndarray, sizes: np.ndarray, color: str, name: str) -> None:
    """Each step faintly, and the largest so far; steps without any difference stay empty."""
    axes.plot(steps, np.where(sizes > 0, sizes, np.nan), ".", color=color, ms=3, alpha=0.45)
    largest = np.maximum.accumulate(sizes)
    label = f"{name}, largest so far"
    axes.plot(steps, np.where(largest > 0, largest, np.nan), color=color, lw=1.6, label=label)


def _mark_phases(axes: Any, phases: Sequence[PhaseMark]) -> None:
    axes.set_xlabel("step")
    if not phases:
        return
    for phase in phases[1:]:
        axes.axvline(phase.first_step - 0.5, color=FAINT, lw=1)
    axes.set_xlim(phases[0].first_step - 0.5, phases[-1].last_step + 0.5)
    parts = [f"{phase.name} to {phase.last_step}" for phase in phases]
    axes.set_xlabel(f"step  ({', then '.join(parts)})")
