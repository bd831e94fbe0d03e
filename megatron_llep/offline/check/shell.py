"""Flags in a shell script, from its words alone: nothing of it is run.

Whatever stands behind conditions is read too. A variable or a flag that gets several values stays
open, as only a run could tell which of them counts.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_llep.offline.check.fill import fill
from megatron_llep.offline.launch.flags import Flags

_ASSIGNMENT = re.compile(r"(\w+)\+?=(.*)", re.DOTALL)
_ARRAY = re.compile(r"\w+\+?=\((?=\s|--)")
_SOURCE = re.compile(r"""^\s*(?:source|\.)\s+["']?(?:\S*\})?/?([\w./-]+\.sh)""", re.MULTILINE)
_COMPUTED = re.compile(r"\$\([^()]*\)|\$\(\([^()]*\)\)")
_TALK = ("#", "echo ", "printf ")
_ENDS = {"|", "||", "&&", "&", ";", ";;", ")", "}", ">", ">>", "2>&1", "then", "fi"}


def read_script(path: Path) -> Flags:
    """The flags of a script, and of scripts beside it that it sources."""
    flags: dict[str, list[str]] = {}
    variables: dict[str, list[str]] = {}
    for line in _list_lines(path):
        flag = None
        for word in _list_words(line):
            if word.startswith("--") and len(word) > 2:
                flag, is_joined, value = word.partition("=")
                values = [value] if is_joined else []
                _note(flags, flag, "")
            elif flag is None:
                assigned = _ASSIGNMENT.fullmatch(word)
                if assigned:
                    _note(variables, assigned[1], assigned[2])
                continue
            elif word in _ENDS or "[@]" in word or "[*]" in word or word in ("$@", "$*"):
                flag = None
                continue
            else:
                values.append(word)
            flags[flag][-1] = " ".join(values)
    return fill(
        {flag: _choose(values) for flag, values in flags.items()},
        {name: values[0] for name, values in variables.items() if len(set(values)) == 1},
    )


def _list_lines(path: Path) -> Iterator[str]:
    """Lines without comments, those that go on joined; first those of scripts that are sourced."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for found in _SOURCE.finditer(text):
        sourced = path.parent / found[1]
        if sourced.is_file() and sourced != path:
            yield from _list_lines(sourced)
    kept = [line for line in text.splitlines() if not line.lstrip().startswith(_TALK)]
    for line in re.sub(r"\\\s*\n", " ", "\n".join(kept)).splitlines():
        line = _COMPUTED.sub(lambda found: "".join(found[0].split()), line)
        yield _ARRAY.sub(" ", line)


def _list_words(text: str) -> Iterator[str]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # a quotation that goes on in the next line
        words = [word.strip("\"'") for word in text.partition(" #")[0].split()]
    for word in words:
        if " --" in word or re.match(r"\w+\+?=[\"']?--", word):  # OPTIONS="--flag value --flag"
            yield from _list_words(word.partition("=")[2] if "=" in word.split("--")[0] else word)
            continue
        bare = word.strip().rstrip(";")
        bare = bare if "(" in bare else bare.removesuffix(")")
        if bare:
            yield bare
        if word.rstrip().endswith((";", ")")):
            yield ";"


def _note(found: dict[str, list[str]], name: str, value: str) -> None:
    found.setdefault(name, []).append(value)


def _choose(values: list[str]) -> object:
    several = list(dict.fromkeys(values))
    if len(several) > 1:
        return f"$({' or '.join(value or 'true' for value in several)})"
    return several[0].split() if several[0] else True
