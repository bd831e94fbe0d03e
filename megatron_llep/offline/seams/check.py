"""Compare what this package uses of Megatron with a tree of it, and with recorded signatures."""

import ast
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llep.offline.seams import recorded
from megatron_llep.offline.seams.signatures import Signature
from megatron_llep.offline.seams.source import Source
from megatron_llep.offline.seams.uses import Reader, Use

PACKAGE_ROOT = Path(__file__).parents[2]
_BASES = ("torch", "enum")
"""Packages that classes of Megatron inherit from, and which are read too."""
_USES_MEGATRON = re.compile(r"\b(from|import) megatron\b")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing of Megatron that is missing, or other than what the package was made for."""

    name: str
    file: Path
    expected: str
    found: str
    users: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            self.name,
            f"in:       {self.file}",
            f"expected: {self.expected}",
            f"found:    {self.found}",
            *(f"used by:  {user}" for user in self.users),
        ]
        return "\n    ".join(lines)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a tree was found to be."""

    changes: list[Change]
    """What is missing or changed."""
    num_names: int
    """How many names of Megatron are used."""


def check(folder: Path, *, also: Sequence[Path] = ()) -> Report:
    """Check a tree of Megatron.

    Args:
        folder: contains `megatron/core`: a source tree, or site-packages.
        also: folders beside the package whose files use Megatron too.

    Raises:
        ValueError: there is no Megatron in the folder.
    """
    uses = read_uses(folder, also=also)
    changes = list(_find_problems(uses))
    named = {change.name for change in changes}
    known = recorded.of_version(read_version(folder))
    changes += [each for each in _compare(uses, known) if each.name not in named]
    changes.sort(key=lambda change: change.name)
    return Report(changes=changes, num_names=len({use.name for use in uses}))


def record(folder: Path, *, also: Sequence[Path] = ()) -> None:
    """Write down the signatures of a tree, in the place of those of its version."""
    recorded.FILE.write_text(note(folder, also=also))


def note(folder: Path, *, also: Sequence[Path] = ()) -> str:
    """What `record` writes."""
    version = ".".join(map(str, read_version(folder)))
    noted = recorded.note(read_uses(folder, also=also), version, recorded.load())
    return json.dumps(noted, indent=1, sort_keys=True) + "\n"


def read_version(folder: Path) -> tuple[int, int]:
    """Major and minor of a tree.

    Raises:
        ValueError: there is no Megatron in the folder, or it does not say its version.
    """
    path = folder / "megatron/core/package_info.py"
    if not path.is_file():
        raise ValueError(f"{folder}: no Megatron, as megatron/core/package_info.py is not in it")
    numbers = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            numbers[ast.unparse(node.targets[0])] = ast.unparse(node.value)
    if not {"MAJOR", "MINOR"} <= numbers.keys():
        raise ValueError(f"{path}: it does not say MAJOR and MINOR, which tell the version")
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def read_uses(folder: Path, *, also: Sequence[Path] = ()) -> list[Use]:
    """All uses of Megatron in the package and in other folders, looked up in a tree."""
    version = read_version(folder)
    folders = {"megatron": folder}
    for name in _BASES:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            folders[name] = Path(found.origin).parents[1 if found.submodule_search_locations else 0]
    source = Source(folders)
    uses: list[Use] = []
    for top in (PACKAGE_ROOT, *also):
        for path in sorted(top.rglob("*.py")):
            text = path.read_text()
            if _USES_MEGATRON.search(text):
                uses += Reader(source, version, text, str(path.relative_to(top.parent))).read()
    return uses


def _find_problems(uses: Sequence[Use]) -> Iterator[Change]:
    """One change for each name and problem, with all users."""
    users: dict[tuple[str, str], list[Use]] = {}
    for use in uses:
        if use.problem:
            users.setdefault((use.name, use.problem), []).append(use)
    for (name, problem), of_it in users.items():
        yield Change(
            name=name,
            file=of_it[0].file,
            expected=of_it[0].expected,
            found=problem,
            users=tuple(use.user for use in of_it),
        )


def _compare(uses: Sequence[Use], known: dict[str, list[str]]) -> Iterator[Change]:
    """Overridden methods are to be as recorded; of called ones, what is given by position."""
    differing: dict[str, list[Use]] = {}
    for use in uses:
        signatures = [Signature.parse(text) for text in known.get(use.name, ())]
        if signatures and not _is_known(use, signatures):
            differing.setdefault(use.name, []).append(use)
    for name, of_it in differing.items():
        signature, short = of_it[0].signature, name.split(".")[-1]
        yield Change(
            name=name,
            file=of_it[0].file,
            expected=" or ".join(f"{short}{text}" for text in known[name]),
            found=f"{short}{signature}" if signature else "it is not there; nothing calls this",
            users=tuple(use.user for use in of_it),
        )


def _is_known(use: Use, known: Sequence[Signature]) -> bool:
    if use.call is not None and use.signature is not None:
        return any(use.signature.reads_as(each, use.call) for each in known)
    return not use.is_override or use.signature in known
