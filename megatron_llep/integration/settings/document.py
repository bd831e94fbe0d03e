"""The tables of settings in the documentation, made from the settings.

python -m megatron_llep.integration.settings.document docs/parallelism.md
"""

import re
import sys
from pathlib import Path

from megatron_llep.integration.settings.setting import Verdict
from megatron_llep.integration.settings.table import SETTINGS

_TABLE = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)

_HEADINGS: dict[Verdict, str] = {
    "supported": "what it means with LLEP",
    "replaced": "what runs instead",
    "refused": "reason and way out",
    "untried": "why, and what is known",
}


def update(text: str) -> str:
    """A document with its tables as they should be.

    Args:
        text: with `<!-- settings: VERDICT -->` and `<!-- end -->` around each table.
    """
    return _TABLE.sub(lambda found: found[1] + render(found[2]) + found[3], text)


def render(verdict: str) -> str:
    """The table of all settings with one verdict, in Markdown."""
    lines = [f"| setting | | {_HEADINGS[verdict]} |", "|---|---|---|"]  # type: ignore[index]
    for setting in SETTINGS:
        if setting.verdict == verdict:
            lines.append(" ".join(f"| {setting.shown} | {verdict} | {setting.text} |".split()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
