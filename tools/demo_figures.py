"""What the demo says of its runs: the figures of summary.json, the table, the panels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from demo_plan import Phase

from megatron_llep.offline.compare.comparison import Comparison, Metric, compare_runs
from megatron_llep.offline.compare.panels import Bars, LayersBeforeAfter
from megatron_llep.offline.compare.picture import (
    Panel,
    load_panels,
    metric_panels,
    step_time_panels,
)
from megatron_llep.offline.compare.report import HOW_MEASURED
from megatron_llep.offline.compare.rows import (
    LLEP_PREFIX,
    PEAK_MEMORY,
    STEP_TIME,
    PhaseMark,
    median_between,
    timed_steps,
)
from megatron_llep.offline.compare.run_log import RunLog
from megatron_llep.offline.compare.table import Row, format_ratio, metric_rows
from megatron_llep.offline.launch.memory import MemoryWatch

LOSS = "lm loss"
NAMES = ("plain EP", "LLEP")
KINDS = ("plain", "llep")
MIB = 2**20


def compare_losses(logs: Mapping[str, RunLog], phases: Sequence[Phase]) -> Comparison:
    """Hold the LLEP run against the plain one.

    Raises:
        RuntimeError: a log lacks steps.
    """
    for log in logs.values():
        steps = log.curve(LOSS).steps
        if not np.array_equal(steps, np.arange(1, phases[-1].last_step + 1)):
            raise RuntimeError(
                f"the log of {log.name} has {steps.size} of {phases[-1].last_step} steps"
            )
    return compare_runs(logs["plain"], logs["llep"], [Metric(name=LOSS, label="loss")])


def summarise(
    comparison: Comparison,
    watches: Mapping[str, Sequence[MemoryWatch]],
    phases: Sequence[Phase],
) -> dict[str, Any]:
    """The figures of the comparison, first in summary.json.

    Step times, medians and lending are those of the last phase, where one domain is trained on
    alone; the other maxima are over both phases.
    """
    sides = dict(zip(KINDS, (comparison.reference, comparison.other), strict=True))
    llep = {
        name.removeprefix(LLEP_PREFIX): curve.values
        for name, curve in sides["llep"].curves.items()
        if name.startswith(LLEP_PREFIX)
    }
    last = slice(phases[-1].first_step - 1, phases[-1].last_step)
    before, after = llep["overload_factor_before"], llep["overload_factor_after"]
    most_before, most_after = llep["max_tokens_before"].max(), llep["max_tokens_after"].max()
    timed = timed_steps(sides["plain"].curve(STEP_TIME), make_marks(phases))
    seconds = {kind: median_between(log.curve(STEP_TIME), timed) for kind, log in sides.items()}
    peaks = {kind: _peak_mib(watches[kind], log) for kind, log in sides.items()}
    checks = {check.name: check for check in comparison.judgements[0].checks}
    return {
        "loss_max_rel_diff": checks["overall"].value,
        "loss_tolerance": checks["overall"].allowed,
        "loss_early_max_rel_diff": checks["early"].value,
        "loss_early_tolerance": checks["early"].allowed,
        "imbalance_before_max": float(before.max()),
        "imbalance_after_max": float(after.max()),
        "imbalance_before_median": float(np.median(before[last])),
        "imbalance_after_median": float(np.median(after[last])),
        "step_time_ratio": seconds["plain"] / seconds["llep"],
        "step_time_ms": {kind: each * 1e3 for kind, each in seconds.items()},
        "step_time_over_steps": list(timed),
        "peak_memory_ratio": peaks["plain"] / peaks["llep"],
        "peak_memory_mib": peaks,
        "peak_memory_of_steps_mib": {kind: _of_steps_mib(watches[kind]) for kind in KINDS},
        "tokens_max_ratio": float(most_before / most_after),
        "tokens_max": {"plain": float(most_before), "llep": float(most_after)},
        "lent_experts_per_step": float(llep["lent_experts"][last].mean()),
        "lent_mib_per_step": float(llep["lent_mib"][last].mean()),
        "lent_mib_total": float(llep["lent_mib"].sum()),
        "fallback_rate": float(llep["fallback_rate"][last].mean()),
        "plan_ms_per_step": float(llep["plan_ms"][last].mean()),
        "steps": phases[-1].last_step,
        "phases": [
            {"name": phase.name, "first_step": phase.first_step, "last_step": phase.last_step}
            for phase in phases
        ],
    }


def make_marks(phases: Sequence[Phase]) -> list[PhaseMark]:
    """The phases as pictures and tables know them."""
    return [PhaseMark(phase.name, phase.first_step, phase.last_step) for phase in phases]


def make_rows(comparison: Comparison, summary: Mapping[str, Any]) -> list[Row]:
    """The table: one row a figure."""
    last = summary["phases"][-1]["name"]
    first_timed, last_timed = summary["step_time_over_steps"]

    def both(title: str, figures: Mapping[str, float], unit: str, note: str | None = None) -> Row:
        plain, llep = figures["plain"], figures["llep"]
        told = format_ratio(plain, llep) if note is None else note
        return title, f"{plain:.0f}{unit}", f"{llep:.0f}{unit}", told

    rows = [
        metric_rows(comparison.results[0])[0],
        (
            "imbalance, worst step and layer",
            f"{summary['imbalance_before_max']:.2f}",
            f"{summary['imbalance_after_max']:.2f}",
            "1 is perfect balance",
        ),
        (
            f"imbalance, worst layer, median of {last}",
            f"{summary['imbalance_before_median']:.2f}",
            f"{summary['imbalance_after_median']:.2f}",
            "",
        ),
        both("most (token, expert) pairs a rank computed", summary["tokens_max"], ""),
        both(
            f"step time, median of steps {first_timed}-{last_timed}",
            summary["step_time_ms"],
            " ms",
        ),
        both("peak memory of the worst rank", summary["peak_memory_mib"], " MiB"),
    ]
    of_steps = summary["peak_memory_of_steps_mib"]
    if of_steps["plain"] is not None:
        rows.append(both("  of which by the training steps", of_steps, " MiB"))
    rows.append(
        (
            f"weights lent a step, mean of {last}",
            "0",
            f"{summary['lent_mib_per_step']:.1f} MiB",
            f"{summary['lent_experts_per_step']:.1f} experts; "
            f"{summary['lent_mib_total']:.0f} MiB in all",
        )
    )
    return rows


def make_panels(
    comparison: Comparison, summary: Mapping[str, Any], phases: Sequence[Phase]
) -> list[Panel]:
    """The picture."""
    marks = make_marks(phases)
    llep = comparison.other
    panels = metric_panels(comparison, NAMES, marks)
    panels += load_panels(llep, marks)
    before = llep.stacked(LLEP_PREFIX + "overload_factor_before")
    after = llep.stacked(LLEP_PREFIX + "overload_factor_after")
    if before is not None and after is not None:
        panels.append(
            LayersBeforeAfter(
                title="Imbalance of each layer, before balancing and after",
                steps=llep.curve(LOSS).steps,
                before=before,
                after=after,
                phases=marks,
            )
        )
    panels += step_time_panels(comparison, NAMES, marks)
    peaks, of_steps = summary["peak_memory_mib"], summary["peak_memory_of_steps_mib"]
    panels.append(
        Bars(
            title="Peak memory of the worst rank",
            unit="MiB",
            xlabel="MiB above Python and its libraries",
            values=(peaks["plain"], peaks["llep"]),
            parts=(of_steps["plain"], of_steps["llep"]),
            part_note="by the steps",
            names=NAMES,
        )
    )
    return panels


def explain(summary: Mapping[str, Any], device: str) -> dict[str, str]:
    """How each figure was measured, for the page and summary.json; `device` is cpu or gpu."""
    first, last = summary["step_time_over_steps"]
    if device == "cpu":
        memory = (
            "Highest resident size (VmHWM) of a rank's process from its first step on, less what "
            "it held before the model was built (Python, libraries, process groups): weights, "
            "gradients, optimizer, activations, lent experts. The larger of both phases, the worst "
            "rank. 'By the training steps' is the same less what the process held right before "
            "its first step."
        )
    else:
        memory = "torch.cuda.max_memory_allocated, the larger of both phases, the worst rank."
    general = {name: text for name, text in HOW_MEASURED.items() if name != "control"}
    return {
        **general,
        "tokens": "(token, expert) pairs that a rank's experts compute in one layer, mean over the "
        "micro-batches of a step; most over steps, layers and ranks.",
        "step time": f"Megatron's own time of an iteration, median over steps {first} to {last}.",
        "memory": memory,
        "lent": "Weights sent, summed over layers, micro-batches averaged; as many gradients come "
        "back.",
    }


def _peak_mib(watches: Sequence[MemoryWatch], log: RunLog) -> float:
    """Of the worst rank and phase; on GPUs what the run itself logged."""
    peaks = [watch.worst_peak for watch in watches if watch.worst_peak is not None]
    return (max(peaks) if peaks else float(log.curve(PEAK_MEMORY).values.max())) / MIB


def _of_steps_mib(watches: Sequence[MemoryWatch]) -> float | None:
    parts = [watch.worst_of_steps for watch in watches if watch.worst_of_steps is not None]
    return max(parts) / MIB if parts else None
