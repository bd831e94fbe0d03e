"""The snippets of docs/frameworks.md, which the tests run."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "frameworks.md").read_text()


def get_blocks(section: str, language: str) -> list[str]:
    """Of the section with this heading, in order."""
    (_, rest) = TEXT.split(f"\n## {section}\n")
    text = rest.split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
