"""What was chosen, as text and as a file of flags."""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_llep.config import flag_of
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.tune.choose import Choice, Outcome
from megatron_llep.offline.tune.settings import describe_setting, list_flags


def format_choice(choice: Choice) -> str:
    """Tables of settings and of imbalances, then the verdict."""
    named = [("best", choice.best)]
    if choice.runner_up is not None:
        named.append(("runner-up", choice.runner_up))
    named += [(f"best of {each.setting.planner}", each) for each in choice.by_planner]
    head = "setting,gain,quartiles,slower,lent,foreign,MiB"
    rows: list[Sequence[object]] = [["", *head.split(",")]]
    rows += [(name, *_list_cells(each, choice)) for name, each in named]
    return "\n\n".join(
        [
            f"{format_table(rows, '<<>>>>>>')}\n"
            "gain: plain expert parallelism's time / this one's, all micro-batches together; "
            "quartiles: of single\nones, of which `slower` lose; lent: experts of a layer, on "
            "average; foreign: most on a rank, and what\nthey take there, weights and gradients",
            _format_bands(choice),
            format_verdict(choice),
        ]
    )


def _list_cells(outcome: Outcome, choice: Choice) -> list[str]:
    return [
        describe_setting(outcome.setting),
        f"{choice.plain_seconds / outcome.seconds:.3f}",
        " ".join(f"{quartile:.3f}" for quartile in outcome.quartiles),
        f"{outcome.slower:.0%}",
        f"{outcome.lent:.1f}",
        str(outcome.foreign),
        f"{outcome.foreign_bytes / 2**20:.0f}",
    ]


def _format_bands(choice: Choice) -> str:
    rows: list[Sequence[object]] = [("imbalance", "layers", "gain of the layer")]
    for band in choice.bands:
        edges = f"{band.low:g} to {band.high:g}" if band.high < float("inf") else f"{band.low:g} on"
        rows.append((edges, f"{band.share:.0%}", f"{band.gain:.3f}"))
    return format_table(rows, "<>>")


def format_verdict(choice: Choice) -> str:
    """Switch on or leave off, and when not to switch on."""
    if choice.reasons:
        return "verdict: leave it off\n" + "\n".join(f"- {reason}" for reason in choice.reasons)
    lines = [f"verdict: switch on, with {describe_setting(choice.best.setting)}"]
    idle = [band for band in choice.bands if band.gain < 1.005]
    if idle:
        share = sum(band.share for band in idle)
        lines.append(
            f"not worth it for runs like the {share:.0%} of layers with an imbalance of "
            f"{', '.join(f'{band.low:g} to {band.high:g}' for band in idle)}"
        )
    return "\n".join(lines)


def write_flags(path: Path, choice: Choice, comments: Sequence[str], base: Path | None) -> None:
    """Write a configuration for tools/launch.py and `check`.

    Args:
        path: of the file.
        choice: what it says; of a setting that is not worth it the flags are comments.
        comments: lines for its top.
        base: the model's file, whose flags these override; without it the reader has to add one.
    """
    flags = list_flags(choice.best.setting)
    off = yaml.safe_dump({"LLEP_ARGS": {flag_of("enabled"): False}})
    body = yaml.safe_dump({"LLEP_ARGS": flags}, sort_keys=False)
    if not choice.switch_on:
        aside = "".join(f"#   {line}\n" for line in body.splitlines()[1:])
        body = f"{off}# The best of what was tried, not worth it:\n{aside}"
    lines = [*comments, *format_verdict(choice).splitlines()]
    head = "".join(f"# {line}\n" for line in lines)
    if base is None:
        head += "# For tools/launch.py name the file of your model here:\n# BASE: model.yaml\n\n"
    else:
        below = os.path.relpath(base.resolve(), path.parent.resolve())
        head += "\n" + yaml.safe_dump({"BASE": below}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + body, encoding="utf-8")
