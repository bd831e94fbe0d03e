"""Whether two curves are the same: by a stated tolerance, and by what this run's noise is.

Letters: N common logged values of a metric.

Two trainings that add the same numbers in another order differ by rounding, some 1e-7 of the loss
in fp32. Training multiplies such differences: once a token whose two best experts tie takes the
other one, they grow by orders of magnitude, at a step that is chance. So the first steps are held
to a tight bound, which a wrong gradient, another learning rate, another seed or other data cannot
keep, and the later ones to a wide one.

How wide is right, a *control* tells: the reference against itself, with another order of summation
or another seed. With a control the other curve must also stay within `factor` times what the
control showed up to about twice as many steps (as the step at which differences begin to grow is
chance), at every step and on average over blocks of steps. The average finds a small shift in one
direction that hides in noise: over n steps noise averages out, the shift does not. A control that
is the reference to the last digit measures nothing and is left out.

One control is one sample of chance. In a step of few tokens one token that takes another expert is
seen in the loss, and it may do so in one run and not in the other (supervised fine-tuning of a toy
model, 350 tokens a step: LLEP 2.4e-3 apart, the control 2.2e-5). So differences below a part of
`overall` are never held against the control: POINT_PART of it at one step, AVERAGE_PART on average.
"""

from dataclasses import dataclass

import numpy as np

from megatron_llep.offline.compare.curves import common_steps, difference, values_at
from megatron_llep.offline.compare.run_log import Curve

ROUNDING_FACTOR = 10.0
"""For a control that starts as the reference does: such differences grow exponentially, and ten
times as much is only a little earlier."""
SEED_FACTOR = 3.0
"""For a control of another seed: its differences are noise, and do not grow."""
HEAD_START = 10
"""Steps by which, beyond a factor of two, the control's differences may begin to grow later."""
POINT_PART, AVERAGE_PART = 1 / 3, 1 / 10
BLOCKS, BLOCK_STEPS = 8, 8
"""Differences are averaged over so many blocks, or fewer, of so many steps or more."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What is allowed between two curves, as a part of the reference's value unless `absolute`.

    early: largest difference in the first `early_steps` steps, from the first common one on;
    `early_steps` 0: the runs share no seed.
    overall: largest difference at any step. With a control a smaller one may be too much, but none
    below `early` or the parts of `overall` that this module's head speaks of.
    factor: how many times the control's difference is allowed; None: ROUNDING_FACTOR where the
    control keeps `early` in the first steps too, SEED_FACTOR where it does not.

    Raises:
        ValueError: a number that allows nothing, or that is not finite.
    """

    early: float = 1e-4
    early_steps: int = 20
    overall: float = 3e-2
    absolute: bool = False
    factor: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("early", self.early), ("overall", self.overall)):
            if not 0 < value < np.inf:
                raise ValueError(f"{name} tolerance {value}: give a number above 0, such as 1e-4")
        if self.early_steps < 0:
            raise ValueError(f"early steps {self.early_steps}: give 0 or more")
        if self.factor is not None and not 1 <= self.factor < np.inf:
            raise ValueError(f"control factor {self.factor}: give 1 or more, such as 10")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One bound: `value` must not exceed `allowed`; `what` names it in a sentence."""

    name: str
    what: str
    value: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the bound is kept."""
        return self.value <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was found about one metric.

    steps [N], apart [N]: size of the difference; allowed [N]: most that every bound together
    lets it be; control [N]: size of the control's difference, None without one, and `factor` how
    many times that is allowed, None if the control measures nothing.
    `gap` says which steps were left out, None if none were.
    """

    metric: str
    tolerance: Tolerance
    checks: tuple[Check, ...]
    steps: np.ndarray
    apart: np.ndarray
    allowed: np.ndarray
    control: np.ndarray | None
    factor: float | None
    gap: str | None

    @property
    def agree(self) -> bool:
        """Whether all bounds are kept."""
        return all(check.ok for check in self.checks)


def judge(
    metric: str,
    reference: Curve,
    other: Curve,
    control: Curve | None,
    tolerance: Tolerance,
    *,
    names: tuple[str, str],
    only_common: bool = False,
) -> Judgement:
    """Compare one metric of two runs.

    Args:
        metric: its name.
        reference: plain expert parallelism, say.
        other: what is held against it.
        control: the reference again, in another order of summation or with another seed.
        tolerance: what is allowed.
        names: of reference and other, for messages.
        only_common: judge the steps that all have; else a run that lacks steps of the other is
            found to differ.

    Raises:
        ValueError: there is no common step, or the control is not finite or lacks steps.
    """
    steps = common_steps([reference, other])
    if not steps.size:
        raise ValueError(
            f"{metric}: {names[0]} has steps {_span(reference.steps)}, {names[1]} "
            f"{_span(other.steps)}: none is common; give runs that were logged at the same steps"
        )
    gap = _describe_gap(reference, other, steps, names)
    if control is not None:
        steps = _steps_of_control(metric, control, steps, only_common=only_common)
    x, y = values_at(reference, steps), values_at(other, steps)
    signed = difference(x, y, absolute=tolerance.absolute)
    apart = np.abs(signed)
    early = steps < steps[0] + tolerance.early_steps
    allowed = np.where(early, min(tolerance.early, tolerance.overall), tolerance.overall)

    checks = [] if gap is None or only_common else [_missing_steps(reference, other, steps)]
    if early.any():
        number = f"the first {early.sum()} steps" if early.sum() > 1 else "the first step"
        what = f"over {number}"
        checks.append(_check("early", what, apart[early].max(), tolerance.early))
    checks.append(_check("overall", "over all", apart.max(), tolerance.overall))
    control_apart = factor = None
    if control is not None:
        c = difference(x, values_at(control, steps), absolute=tolerance.absolute)
        control_apart = np.abs(c)
    if control_apart is not None and control_apart.any():
        factor = tolerance.factor or _choose_factor(control_apart, early, tolerance)
        so_far = _largest_so_far(control_apart, steps - steps[0])
        floor = max(tolerance.early, POINT_PART * tolerance.overall)
        every_step = np.maximum(floor, factor * so_far)
        allowed = np.minimum(allowed, every_step)
        checks.append(_worst("control", "at one step", apart, every_step))
        count = max(1, min(BLOCKS, steps.size // BLOCK_STEPS))
        blocks = np.array_split(np.arange(steps.size), count)
        means, scale = _average_blocks(signed, c, blocks)
        ends = np.array([steps[block[-1]] - steps[0] for block in blocks])
        floor = max(tolerance.early, AVERAGE_PART * tolerance.overall)
        bounds = np.maximum(floor, factor * _largest_so_far(scale, ends))
        what = f"on average over {f'1/{count} of' if count > 1 else ''} the steps".replace(
            "  ", " "
        )
        checks.append(_worst("average", what, means, bounds))
    return Judgement(
        metric=metric,
        tolerance=tolerance,
        checks=tuple(checks),
        steps=steps,
        apart=apart,
        allowed=allowed,
        control=control_apart,
        factor=factor,
        gap=gap,
    )


def _check(name: str, what: str, value: float, allowed: float) -> Check:
    return Check(name=name, what=what, value=float(value), allowed=float(allowed))


def _worst(name: str, what: str, values: np.ndarray, allowed: np.ndarray) -> Check:
    """The place where a bound is kept least."""
    place = int(np.argmax(values / allowed))
    return _check(name, what, values[place], allowed[place])


def _choose_factor(control: np.ndarray, early: np.ndarray, tolerance: Tolerance) -> float:
    first = control[early] if early.any() else control[:1]
    return ROUNDING_FACTOR if first.max() <= tolerance.early else SEED_FACTOR


def _largest_so_far(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Largest value up to about twice as far as each; `places` count from 0."""
    ends = np.searchsorted(places, 2 * places + HEAD_START, side="right") - 1
    return np.maximum.accumulate(values)[ends]


def _average_blocks(
    signed: np.ndarray, control: np.ndarray, blocks: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Size of the mean difference of each block of steps, and the control's.

    Of the control the standard error of the mean if that is larger: one mean may be 0 by chance.
    """
    means = np.array([np.abs(signed[block].mean()) for block in blocks])
    scale = [
        max(abs(control[block].mean()), np.sqrt(np.mean(control[block] ** 2) / block.size))
        for block in blocks
    ]
    return means, np.array(scale)


def _steps_of_control(
    metric: str, control: Curve, steps: np.ndarray, *, only_common: bool
) -> np.ndarray:
    """The steps to judge, all of which the control must have.

    Raises:
        ValueError: it lacks some, or a value of it is not finite.
    """
    common = np.intersect1d(steps, control.steps)
    if not common.size or (common.size < steps.size and not only_common):
        raise ValueError(
            f"{metric}: the control has {common.size} of the {steps.size} steps; give one that "
            "is as long, or --common-steps"
        )
    if not np.isfinite(values_at(control, common)).all():
        raise ValueError(
            f"{metric}: the control is not finite at some step, so it measures nothing"
        )
    return common


def _describe_gap(
    reference: Curve, other: Curve, steps: np.ndarray, names: tuple[str, str]
) -> str | None:
    if steps.size == reference.steps.size == other.steps.size:
        return None
    parts = [
        f"{name} has {curve.steps.size} ({_span(curve.steps)})"
        for name, curve in zip(names, (reference, other), strict=True)
    ]
    return f"{steps.size} steps are common: {', '.join(parts)}"


def _missing_steps(reference: Curve, other: Curve, steps: np.ndarray) -> Check:
    missing = reference.steps.size + other.steps.size - 2 * steps.size
    return _check("steps", "steps that only one run has", missing, 0)


def _span(steps: np.ndarray) -> str:
    return f"{steps[0]}-{steps[-1]}"
