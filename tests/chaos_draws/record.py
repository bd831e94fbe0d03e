"""The result file: what was run, one entry for each run, and sums over all of them."""

import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chaos_draws.crew import Outcome
from megatron_llep import __version__
from megatron_llep.offline.machine import describe_machine

ROOT = Path(__file__).resolve().parents[2]

_MOST_DETAILS = 8
_LONGEST_DETAIL = 600


def append_run(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Add an entry to the file, which is made if it is not there; returns the new totals.

    An entry that goes on where the last one ended becomes part of it.
    """
    runs: list[Mapping[str, Any]] = []
    if path.exists():
        runs = json.loads(path.read_text())["runs"]
    if runs and _goes_on(runs[-1], entry):
        runs[-1] = _join(runs[-1], entry)
    else:
        runs.append(entry)
    totals = sum_up(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"totals": totals, "runs": runs}, indent=1) + "\n")
    part.replace(path)
    return totals


def describe_block(
    seed: int, numbers: range, outcomes: Sequence[Outcome], *, seconds: float, commit: str
) -> dict[str, Any]:
    """An entry: what was run, and what came of it."""
    bad = [outcome for outcome in outcomes if outcome.verdict != "same"]
    return {
        "version": __version__,
        "commit": commit,
        "machine": describe_machine(),
        "seed": seed,
        "first": numbers.start,
        "draws": len(outcomes),
        "failed": len(bad),
        "lent": sum(outcome.lent > 0 for outcome in outcomes),
        "experts_lent": sum(outcome.lent for outcome in outcomes),
        "seconds": round(seconds, 1),
        "slowest_seconds": round(max(outcome.seconds for outcome in outcomes), 1),
        "layouts": _count(str(outcome.draw.layout) for outcome in outcomes),
        "planners": _count(outcome.draw.llep.planner for outcome in outcomes),
        "failures": [
            {
                "repeat": outcome.draw.command,
                "verdict": outcome.verdict,
                "details": [_shorten(each) for each in outcome.details[:_MOST_DETAILS]],
            }
            for outcome in bad
        ],
    }


def sum_up(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all entries; `draws` counts a seed's number once, however often it was run."""
    ran = {
        (run["seed"], number)
        for run in runs
        for number in range(run["first"], run["first"] + run["draws"])
    }
    sums = ("failed", "lent", "experts_lent", "seconds")
    return {
        "draws": len(ran),
        "runs_of_draws": sum(run["draws"] for run in runs),
        **{name: round(sum(run[name] for run in runs), 1) for name in sums},
    }


def read_commit(path: Path) -> str:
    """This checkout's commit, "+changes" if files other than `path` differ from it."""
    if not (ROOT / ".git").exists():
        return "not a checkout"
    head = _run_git("rev-parse", "--short=12", "HEAD")
    where = ["."]
    if path.resolve().is_relative_to(ROOT):
        where.append(f":(exclude){path.resolve().relative_to(ROOT)}")
    changes = _run_git("status", "--porcelain", "--", *where)
    return head + ("+changes" if changes else "")


def _goes_on(last: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    same = ("version", "commit", "machine", "seed")
    ends = last["first"] + last["draws"]
    return ends == entry["first"] and all(last[name] == entry[name] for name in same)


def _join(last: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(last)
    for name in ("draws", "failed", "lent", "experts_lent", "failures"):
        joined[name] = last[name] + entry[name]
    joined["seconds"] = round(last["seconds"] + entry["seconds"], 1)
    joined["slowest_seconds"] = max(last["slowest_seconds"], entry["slowest_seconds"])
    for name in ("layouts", "planners"):
        joined[name] = dict(sorted((Counter(last[name]) + Counter(entry[name])).items()))
    return joined


def _shorten(detail: str) -> str:
    """Of a traceback its heading and the error alone."""
    lines = detail.strip().splitlines()
    text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return text.replace(f"{ROOT}/", "")[:_LONGEST_DETAIL]


def _run_git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
