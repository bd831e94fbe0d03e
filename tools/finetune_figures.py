"""What `make finetune` says of its runs: what is compared, the table and the panels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from finetune_plan import RL, SFT, Stage

from megatron_llep.offline.compare.comparison import Comparison, Metric
from megatron_llep.offline.compare.panels import BeforeAfter
from megatron_llep.offline.compare.picture import (
    Panel,
    load_panels,
    metric_panels,
    step_time_panels,
)
from megatron_llep.offline.compare.rows import STEP_TIME, median_between, timed_steps
from megatron_llep.offline.compare.run_log import RunLog
from megatron_llep.offline.compare.table import Row, format_ratio, metric_rows
from megatron_llep.offline.compare.verdict import Tolerance
from megatron_llep.offline.launch.memory import MemoryWatch

NAMES = ("plain EP", "LLEP")
MIB = 2**20
REWARD_WINDOW = 5
"""Steps over which a reward is averaged: a step's is that of 256 answers."""

# A metric of answers jumps by what a few of them do. The bound is on means of REWARD_WINDOW steps.
_OF_ANSWERS = Tolerance(absolute=True, early=0.05, early_steps=0, overall=0.15)
METRICS: dict[str, list[Metric]] = {
    SFT.name: [
        # A wrong sum cannot be learned: the loss of a step jumps with how many there are in it.
        Metric(name="lm loss", label="answer loss", smooth=10),
        Metric(name="exact match", label="exact match", tolerance=_OF_ANSWERS),
    ],
    RL.name: [
        Metric(name="rl/mean_reward", label="reward", tolerance=_OF_ANSWERS, smooth=REWARD_WINDOW),
        Metric(name="rl/eval_exact_match", label="exact match", tolerance=None),
    ],
}


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


def find_goals(stage: Stage, comparison: Comparison) -> Goals:
    """Measure them."""
    after = comparison.other.curve("moe/llep/overload_factor_after").values
    rise = None
    if stage is RL:
        rewards = [run.curve("rl/mean_reward").values for run in _sides(comparison)]
        plain, llep = (
            float(each[-REWARD_WINDOW:].mean() - each[:REWARD_WINDOW].mean()) for each in rewards
        )
        rise = (plain, llep)
    return Goals(imbalance_after=float(after.max()), reward_rise=rise)


def make_rows(stage: Stage, comparison: Comparison, watches: dict[str, MemoryWatch]) -> list[Row]:
    """The table: one row a figure."""
    rows = [row for result in comparison.results for row in metric_rows(result)]
    for title, stem in _imbalances(stage):
        before, after = (
            float(np.median(comparison.other.curve(f"{stem}_{when}").values))
            for when in ("before", "after")
        )
        rows.append((f"imbalance in {title}, median", f"{before:.2f}", f"{after:.2f}", ""))

    def add(title: str, plain: float, llep: float, unit: str, *, more_is_better: bool) -> None:
        pair = (llep, plain) if more_is_better else (plain, llep)
        rows.append((title, f"{plain:.0f}{unit}", f"{llep:.0f}{unit}", format_ratio(*pair)))

    plain_s, llep_s = (
        median_between(run.curve(STEP_TIME), timed_steps(run.curve(STEP_TIME)))
        for run in _sides(comparison)
    )
    unit, number = _units_a_step(stage)
    add("step time, median", plain_s * 1e3, llep_s * 1e3, " ms", more_is_better=False)
    add(f"{unit} a second", number / plain_s, number / llep_s, "", more_is_better=True)
    plain, llep = (_peak_mib(watches[kind], run) for kind, run in _by_kind(comparison))
    add("peak memory of the worst rank", plain, llep, " MiB", more_is_better=False)
    return rows


def make_panels(stage: Stage, comparison: Comparison) -> list[Panel]:
    """The picture."""
    panels = metric_panels(comparison, NAMES)
    panels += load_panels(comparison.other)[:1]
    for title, stem in _imbalances(stage)[:-1]:
        before, after = (comparison.other.curve(f"{stem}_{when}") for when in ("before", "after"))
        panels.append(
            BeforeAfter(
                title=f"Imbalance in {title}",
                ylabel="most loaded rank / mean",
                steps=before.steps,
                before=before.values,
                after=after.values,
                balanced=1,
                bottom=0.95,
            )
        )
    return panels + step_time_panels(comparison, NAMES)


def explain(stage: Stage, device: str) -> dict[str, str]:
    """How the figures were measured that only this demo has."""
    unit, number = _units_a_step(stage)
    memory = "torch.cuda.max_memory_allocated, the worst rank."
    if device == "cpu":
        memory = (
            "Highest resident size (VmHWM) of a rank's process from its first step on, less what "
            "it held before the model was built (Python, libraries, process groups); worst rank."
        )
    return {
        f"{unit} a second": f"{number} {unit} a step, over the median time of a step.",
        "exact match": "Share of held-out sums that the model answers right, greedily.",
        "memory": memory,
    }


def _imbalances(stage: Stage) -> list[tuple[str, str]]:
    """What to call it, and how it is logged without `_before` and `_after`; training last."""
    rollout = []
    if stage is RL:
        rollout = [
            ("rollout, reading prompts", "rl/prefill_imbalance"),
            ("rollout, decoding (nothing is lent)", "rl/decode_imbalance"),
        ]
    return [*rollout, ("training", "moe/llep/overload_factor")]


def _units_a_step(stage: Stage) -> tuple[str, int]:
    flags: dict[str, Any] = dict(stage.flags())
    batch = int(flags["--global-batch-size"])
    return ("answers", batch) if stage is RL else ("tokens", batch * int(flags["--seq-length"]))


def _sides(comparison: Comparison) -> tuple[RunLog, RunLog]:
    return comparison.reference, comparison.other


def _by_kind(comparison: Comparison) -> Sequence[tuple[str, RunLog]]:
    return list(zip(("plain", "llep"), _sides(comparison), strict=True))


def _peak_mib(watch: MemoryWatch, log: RunLog) -> float:
    peak = watch.worst_peak
    return (log.curve("peak-memory-worst-rank-bytes").values.max() if peak is None else peak) / MIB
