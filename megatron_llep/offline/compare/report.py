"""Write a comparison: JSON, PNG, HTML, and wandb runs where wandb is on; say it in the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llep.offline.compare.comparison import Comparison
from megatron_llep.offline.compare.page import Page
from megatron_llep.offline.compare.picture import Panel, draw_picture
from megatron_llep.offline.compare.table import Row, format_table, format_verdict
from megatron_llep.offline.compare.wandb_out import log_comparison, wandb_is_on

HOW_MEASURED = {
    "difference": "At each step that both runs logged, as a part of the first run's value unless "
    "it says absolute. The first steps are held to a tight bound, which a wrong gradient, another "
    "learning rate or other data cannot keep; later ones to a wide one, because training "
    "multiplies the rounding differences of two orders of summation.",
    "control": "The first run against itself, with another order of summation or another seed. "
    "Where one was given, the second run must also stay within a multiple of what the control "
    "showed up to about twice as many steps, at every step and on average over blocks of steps; "
    "below a third (on average a tenth) of the stated tolerance nothing is held against it, as one "
    "control is one sample of chance.",
    "wall time": "From the times at which values were logged: from the first logged step on, so "
    "without start-up and first step; where a run was resumed or has phases, without the time "
    "between them. Evaluation and rollouts are inside.",
    "time to a target": "Until the mean of the last twentieth of all logged values (of fewer than "
    "40, the value itself) is at the target or beyond. Where no target was given, it is the level "
    "at which both end: the worse of their means over the last tenth.",
    "imbalance": "Tokens of the most loaded rank / mean over ranks, worst layer. Of a plain run: "
    "what the routing of the LLEP run asks of the ranks before it is balanced.",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is said about a comparison.

    names: of the two runs, for people.
    subject: what agrees or differs, in the plural; None: the two runs.
    figures: more entries for the JSON file, first ones.
    """

    comparison: Comparison
    title: str
    intro: str
    names: tuple[str, str]
    rows: Sequence[Row]
    panels: Sequence[Panel]
    columns: int = 3
    subject: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    how_measured: Mapping[str, str] = field(default_factory=lambda: HOW_MEASURED)
    machine: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """In one sentence."""
        return format_verdict(self.comparison, self.subject)


def write_report(
    report: Report,
    *,
    summary: Path,
    picture: Path,
    page: Path,
    wandb_project: str | None = None,
    wandb_folder: Path | None = None,
) -> None:
    """Write the files and print table, verdict and where the page is.

    Args:
        report: what to write.
        summary: JSON file.
        picture: PNG file.
        page: HTML file.
        wandb_project: where the comparison is logged, if wandb is on; None: nowhere.
        wandb_folder: where wandb makes its folder; default: that of the page.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        **report.figures,
        "verdict": report.verdict,
        "comparison": report.comparison.describe(),
        "rows": [list(row) for row in report.rows],
        "machine": dict(report.machine),
        "how_measured": dict(report.how_measured),
    }
    summary.write_text(json.dumps(_finite(figures), indent=2, allow_nan=False) + "\n")
    draw_picture(report.panels, report.title, picture, columns=report.columns)
    Page(
        title=report.title,
        intro=report.intro,
        agree=report.comparison.agree,
        verdict=report.verdict,
        names=report.names,
        rows=report.rows,
        how_measured=report.how_measured,
        machine=report.machine,
        commands=report.commands,
    ).write(picture, page)
    print(f"\n{format_table(report.rows, report.names)}\n")
    print(report.verdict)
    if wandb_project and wandb_is_on():
        log_comparison(
            report.comparison,
            report.rows,
            report.verdict,
            picture,
            project=wandb_project,
            group=page.parent.resolve().name,
            folder=wandb_folder or page.parent,
        )


def _finite(value: Any) -> Any:
    """The same with numbers that JSON does not know as text."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
