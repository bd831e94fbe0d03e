"""The page of a comparison: one HTML file with everything in it."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_llep.offline.compare.table import Row

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #333; max-width: 76rem; margin: 2rem auto;
       padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { width: 100%; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; }
td:last-child { color: #666; }
.facts td { text-align: left; } .facts td:first-child { white-space: nowrap; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; color: #555; max-width: 60rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem;
      white-space: pre-wrap; word-break: break-all; }
.verdict { border-left: 5px solid; padding: .5rem .9rem; background: #f7f9fa; }
.good { border-color: #1d6a96; }
.bad { border-color: #b3261e; background: #fdf3f2; color: #8c1d18; font-weight: 600; }
"""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page says, from top to bottom."""

    title: str
    intro: str
    agree: bool
    verdict: str
    names: tuple[str, str]
    rows: Sequence[Row]
    how_measured: Mapping[str, str]
    machine: Mapping[str, object] = field(default_factory=dict)
    commands: Sequence[str] = ()

    def write(self, image: Path, path: Path) -> None:
        """Write it; the picture is inside and nothing is loaded from elsewhere."""
        escape = html.escape
        picture = base64.b64encode(image.read_bytes()).decode()
        cells = "\n".join(
            "<tr>" + "".join(f"<td>{escape(cell.strip())}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        head = "".join(f"<th>{escape(name)}</th>" for name in ("", *self.names, ""))
        measured = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
            for name, text in self.how_measured.items()
        )
        facts = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
            for name, value in self.machine.items()
        )
        parts = [f"<h2>How it was measured</h2><dl>{measured}</dl>"]
        if facts:
            parts.append(f'<h2>Machine</h2><table class="facts">{facts}</table>')
        if self.commands:
            parts.append(f"<h2>Commands</h2><pre>{escape(chr(10).join(self.commands))}</pre>")
        below = "\n".join(parts)
        path.write_text(
            f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{escape(self.title)}</h1>
<p>{escape(self.intro)}</p>
<p class="verdict {"good" if self.agree else "bad"}">{escape(self.verdict)}</p>
<table><tr>{head}</tr>
{cells}</table>
<img alt="Curves of both runs" src="data:image/png;base64,{picture}">
{below}
</body></html>
""",
            encoding="utf-8",
        )
