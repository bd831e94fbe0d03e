"""The page: its template, styles and scripts, and the data, in one file that loads nothing.

The data are JSON, deflated and written in base64, which browsers unpack by themselves.
"""

import base64
import html
import json
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

SCRIPTS = ("data.js", "colours.js", "heatmap.js", "lines.js", "details.js", "page.js")
"""In the order in which they stand in the page."""


def write_page(path: Path, view: dict[str, Any]) -> int:
    """Write the page; its size in bytes.

    Raises:
        ValueError: it cannot be written there.
    """
    text = make_page(view)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--output {path}: {error.strerror}; give a file that can be written"
        ) from error
    return path.stat().st_size


def make_page(view: dict[str, Any]) -> str:
    """The whole file."""
    assets = files("megatron_llep.offline.view") / "assets"
    packed = zlib.compress(json.dumps(view, separators=(",", ":")).encode(), 9)
    parts = {
        "@TITLE@": html.escape(view["title"]),
        "@SUMMARY@": html.escape(view["summary"]),
        "@STYLE@": (assets / "page.css").read_text(encoding="utf-8"),
        "@SCRIPT@": "\n".join((assets / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "@DATA@": base64.b64encode(packed).decode(),
    }
    text = (assets / "page.html").read_text(encoding="utf-8")
    for mark, part in parts.items():
        text = text.replace(mark, part)
    return text
