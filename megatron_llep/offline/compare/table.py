"""The comparison in words: a table of figures and a verdict of one sentence."""

from collections.abc import Sequence

from megatron_llep.offline.compare.comparison import Comparison, MetricResult
from megatron_llep.offline.compare.verdict import Check, Judgement

Row = tuple[str, str, str, str]
"""Figure, reference, other, and what the two say together."""


def format_table(rows: Sequence[Row], names: tuple[str, str]) -> str:
    """The table as text; `names` are those of the two runs."""
    table = [("", *names, ""), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = []
    for name, reference, other, note in table:
        line = f"{name:<{widths[0]}}  {reference:>{widths[1]}}  {other:>{widths[2]}}  {note}"
        lines.append(line.rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


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
        parts = [_describe(comparison, each, each.checks, named=named) for each in judgements]
        return f"{subject} agree: {'; '.join(parts)}.{_describe_control(comparison)}"
    parts = [
        _describe(comparison, each, [c for c in each.checks if not c.ok], named=named)
        for each in judgements
        if not each.agree
    ]
    return f"{subject.upper()} DIFFER: {'; '.join(parts)}.{_describe_control(comparison)}"


def _describe(
    comparison: Comparison, judgement: Judgement, checks: Sequence[Check], *, named: bool
) -> str:
    """One metric: the differences that were found, with what is allowed."""
    kind = "absolute" if judgement.tolerance.absolute else "relative"
    parts: list[str] = []
    for check in checks:
        if check.name == "steps":
            parts.append(f"{judgement.gap} (--common-steps compares what is common)")
            continue
        value = "not finite" if check.value == float("inf") else f"{check.value:.1e}"
        first = not any("apart" in part for part in parts)
        apart = f"at most {value} apart ({kind})" if first else value
        parts.append(f"{apart} {check.what}, {check.allowed:.0e} allowed")
    text = "; ".join(parts)
    if judgement.gap and not any(check.name == "steps" for check in checks):
        text += f" ({judgement.gap})"
    title = comparison.result(judgement.metric).metric.title
    return f"{title} {text}" if named else text


def _describe_control(comparison: Comparison) -> str:
    """What the bounds rest on."""
    if comparison.control is None:
        return ""
    parts = []
    for judgement in comparison.judgements:
        title = comparison.result(judgement.metric).metric.title
        if judgement.control is None:
            continue
        if judgement.factor is None:
            parts.append(f"{title}: the same to the last digit, so it measures nothing")
        else:
            parts.append(
                f"{title} apart by up to {judgement.control.max():.1e}, of which "
                f"{judgement.factor:g} times is allowed at each step"
            )
    return f" Control ({comparison.control.name} against {comparison.reference.name}): " + (
        "; ".join(parts) + "."
    )


NO_CONTROL = (
    "No control was given: the tolerance is stated, not measured (--control measures what \"the "
    'same" means for this run).'
)


def metric_rows(result: MetricResult) -> list[Row]:
    """The last value of a metric, and the time to its target."""
    title = result.metric.title
    note = ""
    if result.judgement is not None:
        found = result.judgement
        note = (
            f"apart by at most {found.apart.max():.1e} (allowed {found.tolerance.overall:.0e})"
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
