"""Write a comparison: JSON, PNG, HTML, and wandb runs where wandb is on; say it in the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llep.offline.compare.comparison import Comparison
from megatron_llep.offline.compare.picture import Panel, draw_picture
from megatron_llep.offline.compare.table import Row, format_verdict
from megatron_llep.offline.compare.wandb_out import log_comparison, wandb_is_on
from megatron_llep.offline.report import page as html
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table

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

    subject: what agrees or differs, in the plural; None: the two runs.
    figures: more entries for the JSON file.
    """

    comparison: Comparison
    title: str
    intro: str
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

    @property
    def table(self) -> list[Row]:
        """The rows below a head that names the runs."""
        return [("", *self.comparison.names, ""), *self.rows]


def write_report(
    report: Report, folder: Path, files: tuple[str, str, str], wandb_project: str | None = None
) -> None:
    """Write the files and print table and verdict.

    Args:
        report: what to write.
        folder: of the files; also where wandb makes its own.
        files: names of the JSON, PNG and HTML file.
        wandb_project: where the comparison is logged, if wandb is on; None: nowhere.
    """
    summary, picture, page = (folder / name for name in files)
    figures = {
        **report.figures,
        "verdict": report.verdict,
        "comparison": report.comparison.describe(),
        "rows": report.rows,
        "how_measured": report.how_measured,
    }
    write_results(summary, figures, machine=report.machine)
    draw_picture(report.panels, report.title, picture, columns=report.columns)
    html.write_page(page, report.title, _make_parts(report, picture))
    print(f"\n{format_table(report.table, '<>><', rule=True)}\n")
    print(report.verdict)
    if wandb_project and wandb_is_on():
        log_comparison(
            report.comparison,
            report.rows,
            report.verdict,
            picture,
            project=wandb_project,
            group=folder.resolve().name,
            folder=folder,
        )


def _make_parts(report: Report, picture: Path) -> list[str]:
    """The page, from top to bottom."""
    parts = [
        html.make_text(report.intro),
        html.make_text(
            report.verdict, kind=f"verdict {'good' if report.comparison.agree else 'bad'}"
        ),
        html.make_table(report.table, "noted"),
        html.make_picture(picture, "Curves of both runs"),
        html.make_text("How it was measured", "h2"),
        html.make_definitions(report.how_measured),
    ]
    if report.machine:
        parts.append(html.make_text("Machine", "h2"))
        parts.append(html.make_table(list(report.machine.items()), "facts", head=False))
    if report.commands:
        parts.append(html.make_text("Commands", "h2"))
        parts.append(html.make_text("\n".join(report.commands), "pre"))
    return parts
