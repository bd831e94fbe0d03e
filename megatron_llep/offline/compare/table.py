"""The comparison in words: rows of figures and a verdict of one sentence."""

from collections.abc import Sequence

from megatron_llep.offline.compare.comparison import Comparison, MetricResult
from megatron_llep.offline.compare.verdict import Check, Judgement

Row = tuple[str, str, str, str]
"""Figure, reference, other, and what the two say together."""


def format_ratio(reference: float, other: float) -> str:
    """How many times the other's figure the reference's is."""
    return f"{reference / other:.2f}x" if other else ""


def format_verdict(comparison: Comparison, subject: str | None = None) -> str:
    """Whether the runs agree, by how much, what was allowed and what that rests on.

    Args:
        comparison: of the runs.
        subject: what agrees or differs, in the plural; default: the two runs, by name.
    """
    judgements = comparison.judgements
    named = subject is None or len(judgements) > 1
    subject = subject or f"{comparison.reference.name} and {comparison.other.name}"
    if comparison.agree:
        said, word = judgements, "agree"
    else:
        said, word = tuple(each for each in judgements if not each.agree), "DIFFER"
        subject = subject.upper()
    parts = [_describe(comparison, each, named=named) for each in said]
    return f"{subject} {word}: {'; '.join(parts)}."


def _describe(comparison: Comparison, judgement: Judgement, *, named: bool) -> str:
    """One metric: the differences that were found, with what is allowed."""
    kind = "absolute" if judgement.tolerance.absolute else "relative"
    # Where runs differ only the bounds that are not kept.
    checks = [check for check in judgement.checks if judgement.agree or not check.ok]
    stated = [check for check in checks if check.name in ("early", "overall")]
    parts = []
    if judgement.gap:
        failed = any(check.name == "steps" for check in checks)
        hint = " (--common-steps compares what is common)" if failed else ""
        parts.append(judgement.gap + hint)
    parts += [
        f"{'at most ' if check is stated[0] else ''}{_size(check.value)}"
        f"{f' apart ({kind})' if check is stated[0] else ''} {check.what}, "
        f"{_bound(check.allowed)} allowed"
        for check in stated
    ]
    if comparison.control is not None and judgement.control is not None:
        parts.append(_describe_control(comparison, judgement, checks))
    text = "; ".join(parts)
    return f"{comparison.result(judgement.metric).metric.title} {text}" if named else text


def _describe_control(comparison: Comparison, judgement: Judgement, checks: Sequence[Check]) -> str:
    """What was found against the control."""
    assert comparison.control is not None
    assert judgement.control is not None
    control, reference = comparison.control.name, comparison.reference.name
    if judgement.factor is None:
        return f"the control ({control}) is {reference} to the last digit and measures nothing"
    size = f"up to {judgement.control.max():.1e} apart from {reference}"
    broken = [
        f"{_size(check.value)} {check.what}, {_bound(check.allowed)} allowed"
        for check in checks
        if check.name in ("control", "average") and not check.ok
    ]
    if broken:
        return f"more than the control ({control}, {size}) allows: {', '.join(broken)}"
    return f"within what the control ({control}, {size}) allows"


def _size(value: float) -> str:
    return "not finite" if value == float("inf") else f"{value:.1e}"


def _bound(value: float) -> str:
    """With one digit where that says it all."""
    short = f"{value:.0e}"
    return short if float(short) == value else f"{value:.2g}"


NO_CONTROL = (
    'No control was given: the tolerance is stated, not measured (--control measures what "the '
    'same" means for this run).'
)


def metric_rows(result: MetricResult) -> list[Row]:
    """The last value of a metric, and the time to its target."""
    title = result.metric.title
    note = ""
    if result.judgement is not None:
        found = result.judgement
        note = (
            f"apart by at most {found.apart.max():.1e} (allowed {_bound(found.tolerance.overall)})"
            if found.apart.max() < float("inf")
            else "not finite"
        )
    last = [f"{curve.values[-1]:.5f}" for curve in (result.reference, result.other)]
    rows = [(f"{title}, last step", last[0], last[1], note)]
    race = result.race
    if race is not None:
        sides = [
            "not reached" if each is None else f"{each.seconds:.1f} s (step {each.step})"
            for each in (race.reference, race.other)
        ]
        speedup = "" if race.speedup is None else f"{race.speedup:.2f}x"
        rows.append((f"time to {title} {race.target:.4g}", sides[0], sides[1], speedup))
    return rows
