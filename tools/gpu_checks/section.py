"""What one section of the check found, in words and for the JSON file."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["passed", "FAILED", "skipped", "not judged"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the check."""

    name: str
    state: State
    """skipped: it did not run. not judged: it ran, but its demands do not apply to this run."""
    reason: str = ""
    """Why, in one line; also what fell short."""
    data: dict[str, Any] = field(default_factory=dict)
    """Everything that was measured."""


def run_section(name: str, work: Callable[[], Section]) -> Section:
    """Run one section; an error in it fails this section and lets the others run."""
    print(f"\n== {name}", flush=True)
    try:
        section = work()
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip() or type(error).__name__
        section = Section(name=name, state="FAILED", reason=text.splitlines()[-1])
    print(f"{name}: {_describe(section)}", flush=True)
    return section


def format_summary(sections: list[Section]) -> str:
    """One line for each section."""
    width = max(len(section.name) for section in sections)
    return "\n".join(f"{section.name:{width}}  {_describe(section)}" for section in sections)


def _describe(section: Section) -> str:
    return f"{section.state}: {section.reason}" if section.reason else section.state
