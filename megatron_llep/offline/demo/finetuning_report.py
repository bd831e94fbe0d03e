"""What `make finetune` says of its runs: goals, the table and the panels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llep.offline.compare.comparison import Comparison
from megatron_llep.offline.compare.picture import (
    Panel,
    imbalance_panel,
    load_panels,
    metric_panels,
    step_time_panels,
)
from megatron_llep.offline.compare.report import HOW_MEASURED, write_report
from megatron_llep.offline.compare.rows import LLEP_PREFIX, pair_row
from megatron_llep.offline.compare.table import Row, format_ratio, metric_rows
from megatron_llep.offline.demo.driver import MEMORY, Trained, make_report
from megatron_llep.offline.demo.finetuning import REWARD_WINDOW, RL, WANDB_PROJECT, Stage

_ROLLOUT = {
    "rollout, reading prompts": "rl/prefill_imbalance",
    "rollout, decoding (nothing is lent)": "rl/decode_imbalance",
}
"""What to call the imbalance, and how it is logged without `_before` and `_after`."""


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What a stage is to reach besides curves that agree, as measured."""

    imbalance_after: float
    """The worst of any training step and layer."""
    reward_rise: tuple[float, float] | None
    """Of both runs, last steps over first ones; None for SFT."""

    def describe(self) -> str:
        """In a sentence."""
        text = f"Imbalance after balancing is at most {self.imbalance_after:.2f} in training"
        if self.reward_rise is not None:
            plain, llep = self.reward_rise
            text += f"; reward rose by {plain:.2f} (plain) and {llep:.2f} (LLEP)"
        return text + "."


def write(stage: Stage, trained: Trained, out: Path) -> None:
    """Write the stage's .json, .png and .html, and print the table."""
    device = trained.device.name
    goals = find_goals(stage, trained.comparison)
    report = make_report(
        trained,
        title=f"{stage.title}: plain expert parallelism and LLEP, same start, same data",
        intro=f"A small mixture-of-experts model, {stage.world_size} ranks on the "
        f"{device.upper()}, no auxiliary loss. {goals.describe()}",
        rows=make_rows(stage, trained),
        panels=make_panels(stage, trained.comparison),
        figures={"goals": vars(goals)},
        how_measured=explain(stage, device),
    )
    files = (f"{stage.name}.json", f"{stage.name}.png", f"{stage.name}.html")
    write_report(report, out, files, WANDB_PROJECT)
    print(goals.describe(), flush=True)


def find_goals(stage: Stage, comparison: Comparison) -> Goals:
    """Measure them."""
    after = comparison.other.curve(LLEP_PREFIX + "overload_factor_after").values
    rise = None
    if stage is RL:
        rewards = [run.curve("rl/mean_reward").values for run in comparison.sides]
        plain, llep = (
            float(each[-REWARD_WINDOW:].mean() - each[:REWARD_WINDOW].mean()) for each in rewards
        )
        rise = (plain, llep)
    return Goals(imbalance_after=float(after.max()), reward_rise=rise)


def make_rows(stage: Stage, trained: Trained) -> list[Row]:
    """The table: one row a figure."""
    comparison = trained.comparison
    rows = [row for result in comparison.results for row in metric_rows(result)]
    stems = (_ROLLOUT if stage is RL else {}) | {"training": LLEP_PREFIX + "overload_factor"}
    for title, stem in stems.items():
        before, after = (
            float(np.median(comparison.other.curve(f"{stem}_{when}").values))
            for when in ("before", "after")
        )
        rows.append(pair_row(f"imbalance in {title}, median", (before, after), note=""))
    plain, llep = trained.step_seconds()
    unit, number = _units_a_step(stage)
    rates = (number / plain, number / llep)
    return [
        *rows,
        pair_row("step time, median", (plain * 1e3, llep * 1e3), "{:.0f} ms"),
        pair_row(f"{unit} a second", rates, "{:.0f}", format_ratio(plain, llep)),
        pair_row("peak memory of the worst rank", trained.peak_mib(), "{:.0f} MiB"),
    ]


def make_panels(stage: Stage, comparison: Comparison) -> list[Panel]:
    """The picture."""
    panels = metric_panels(comparison) + load_panels(comparison.other)[:1]
    for title, stem in _ROLLOUT.items() if stage is RL else ():
        panels += imbalance_panel(comparison.other, f"Imbalance in {title}", stem)
    return panels + step_time_panels(comparison)


def explain(stage: Stage, device: str) -> dict[str, str]:
    """How the figures were measured; `device` is cpu or gpu."""
    unit, number = _units_a_step(stage)
    return {
        **HOW_MEASURED,
        f"{unit} a second": f"{number} {unit} a step, over the median time of a step.",
        "exact match": "Share of held-out sums that the model answers right, greedily.",
        "memory": MEMORY[device],
    }


def _units_a_step(stage: Stage) -> tuple[str, int]:
    flags: dict[str, Any] = dict(stage.flags())
    batch = int(flags["--global-batch-size"])
    return ("answers", batch) if stage is RL else ("tokens", batch * int(flags["--seq-length"]))
