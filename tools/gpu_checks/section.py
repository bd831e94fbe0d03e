"""What one section of the check found, in words and for the JSON file."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gpu_checks.environment import is_installed
from megatron_llep.offline.report.table import format_table

State = Literal["passed", "FAILED", "skipped", "not judged"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the check."""

    name: str
    state: State
    """skipped: it did not run. not judged: it ran, but its demands do not apply to this run."""
    reason: str = ""
    """Why, in one line; also what fell short."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Everything that was measured."""

    @property
    def verdict(self) -> str:
        """State and reason."""
        return f"{self.state}: {self.reason}" if self.reason else self.state


class SkippedError(Exception):
    """A section cannot run here; says why."""


def require(*modules: str) -> None:
    """Skip the section unless all these can be imported."""
    for module in modules:
        if not is_installed(module):
            raise SkippedError(f"{module} is not installed")


def judge(name: str, short: Sequence[str], data: Mapping[str, Any]) -> Section:
    """A section that failed if anything fell short."""
    state: State = "FAILED" if short else "passed"
    return Section(name=name, state=state, reason="; ".join(short), data=data)


def run_section(name: str, work: Callable[[], Section]) -> Section:
    """Run one section; an error in it fails this section and lets the others run."""
    print(f"\n== {name}", flush=True)
    try:
        section = work()
    except SkippedError as reason:
        section = Section(name=name, state="skipped", reason=str(reason))
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip() or type(error).__name__
        section = Section(name=name, state="FAILED", reason=text.splitlines()[-1])
    print(f"{name}: {section.verdict}", flush=True)
    return section


def format_summary(sections: Sequence[Section]) -> str:
    """One line for each section."""
    return format_table([(section.name, section.verdict) for section in sections], "<")
