"""Make conversations to fine-tune on, without a network: JSONL, one object with messages a line.

    python tools/make_conversations.py arithmetic --output data/arithmetic.jsonl
    python tools/make_conversations.py arithmetic --right-share 0.6 --output data/weak.jsonl
    python tools/make_conversations.py python-stdlib --output data/stdlib.jsonl

arithmetic: sums such as `3+4=`, of numbers below 10 ** --digits. python-stdlib: what a function or
class of the standard library does, and what it is called with, from the sources of the Python that
runs this. The same seed, and the same Python, give the same file.
"""

import argparse
import ast
import inspect
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

Turns = list[tuple[str, str]]
"""Role and content of each message."""

_SKIPPED = {"idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"}


def make_arithmetic(count: int, digits: int, right_share: float, seed: int) -> Iterator[Turns]:
    """Sums; some with a wrong answer, if not all are to be right.

    Args:
        count: conversations.
        digits: numbers have at most so many.
        right_share: of answers, the others are another sum of such numbers.
        seed: of everything drawn.
    """
    draw = random.Random(seed)
    largest = 10**digits - 1
    for _ in range(count):
        a, b = draw.randint(0, largest), draw.randint(0, largest)
        answer = a + b
        while draw.random() >= right_share and answer == a + b:
            answer = draw.randint(0, 2 * largest)
        yield [("user", f"{a}+{b}="), ("assistant", str(answer))]


def make_stdlib(count: int, seed: int) -> Iterator[Turns]:
    """Two questions about each of `count` public functions and classes, drawn at random."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [each for path in _list_public_modules(root) for each in _describe_module(root, path)]
    random.Random(seed).shuffle(found)
    for name, call, does in found[:count]:
        yield [
            ("user", f"What does {name} do?"),
            ("assistant", does),
            ("user", "How is it called?"),
            ("assistant", call),
        ]


def _list_public_modules(root: Path) -> list[Path]:
    """The library's modules, without tests, installed packages and what starts with `_`."""
    paths = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    return [
        path
        for path in paths
        if _SKIPPED.isdisjoint(path.parts)
        and not any(part.startswith("_") for part in path.with_suffix("").parts[:-1])
        and (path.name == "__init__.py" or not path.name.startswith("_"))
    ]


def _describe_module(root: Path, path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, call and first paragraph of what the functions and classes of a module do."""
    module = ".".join(part for part in path.with_suffix("").parts if part != "__init__")
    try:
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and files of other encodings
        return
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        does = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
        if isinstance(node, ast.ClassDef):
            call = ", ".join(ast.unparse(base) for base in node.bases)
            call = f"class {node.name}({call})" if call else f"class {node.name}"
        else:
            call = f"{node.name}({ast.unparse(node.args)})"
        yield f"{module}.{node.name}", call, does


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("arithmetic", "python-stdlib"))
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the JSONL file")
    add("--count", type=int, default=10_000, help="most conversations (default: 10000)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--digits", type=int, default=1, help="arithmetic: digits of a number (default: 1)")
    add("--right-share", type=float, default=1.0, help="arithmetic: share of right answers")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for option in ("count", "digits"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}: give 1 or more")
    if not 0 <= args.right_share <= 1:
        parser.error(f"--right-share {args.right_share}: give a share from 0 to 1")
    if args.kind == "arithmetic":
        made = make_arithmetic(args.count, args.digits, args.right_share, args.seed)
    else:
        made = make_stdlib(args.count, args.seed)
    lines = []
    for turns in made:
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}) + "\n")
    if not lines:
        parser.error(f"{args.kind}: there is nothing to ask about")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(lines), encoding="utf-8")
    print(f"{args.output}: {len(lines)} conversations")


if __name__ == "__main__":
    main()
