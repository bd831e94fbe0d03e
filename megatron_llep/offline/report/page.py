"""One HTML page that holds all it shows and loads nothing; its parts are texts of HTML."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #333; max-width: 76rem; margin: 2rem auto;
       padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
img { max-width: 100%; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; }
table:not([class]) { font-size: .85rem; width: auto; }
.noted td:last-child { color: #666; }
.facts td { text-align: left; } .facts td:first-child { white-space: nowrap; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; color: #555; max-width: 60rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem;
      white-space: pre-wrap; word-break: break-all; }
.verdict { border-left: 5px solid; padding: .5rem .9rem; background: #f7f9fa; }
.good { border-color: #1d6a96; }
.bad { border-color: #b3261e; background: #fdf3f2; color: #8c1d18; font-weight: 600; }
"""


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write the parts, one below the other, under the title."""
    head = html.escape(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width"><title>{head}</title>\n'
        f"<style>{STYLE}</style></head><body>\n<h1>{head}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n",
        encoding="utf-8",
    )


def make_text(text: str, tag: str = "p", kind: str = "") -> str:
    """A paragraph, or whatever the tag says; `kind` is a class of the style."""
    return f"{_open(tag, kind)}{html.escape(text)}</{tag}>"


def make_picture(image: Path, what: str) -> str:
    """A PNG file's picture."""
    data = base64.b64encode(image.read_bytes()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'


def make_table(rows: Sequence[Sequence[object]], kind: str = "", *, head: bool = True) -> str:
    """A table; the first row is its head if there is to be one."""
    lines = []
    for number, row in enumerate(rows):
        tag = "th" if head and number == 0 else "td"
        lines.append("".join(make_text(str(cell).strip(), tag) for cell in row))
    return _open("table", kind) + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def make_definitions(terms: Mapping[str, str]) -> str:
    """Terms, each with a text below it."""
    both = (make_text(term, "dt") + make_text(text, "dd") for term, text in terms.items())
    return f"<dl>{''.join(both)}</dl>"


def _open(tag: str, kind: str) -> str:
    return f'<{tag} class="{kind}">' if kind else f"<{tag}>"
