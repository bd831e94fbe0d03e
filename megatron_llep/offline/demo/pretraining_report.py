"""What `make demo` says of its runs: the figures of summary.json, the table, the panels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llep.offline.compare.panels import Bars, LayersBeforeAfter
from megatron_llep.offline.compare.picture import (
    Panel,
    load_panels,
    metric_panels,
    step_time_panels,
)
from megatron_llep.offline.compare.report import HOW_MEASURED, write_report
from megatron_llep.offline.compare.rows import (
    LLEP_PREFIX,
    STEP_TIME,
    PhaseMark,
    pair_row,
    timed_steps,
)
from megatron_llep.offline.compare.table import Row, metric_rows
from megatron_llep.offline.demo.driver import MEMORY, SIDES, Trained, find_worst, make_report
from megatron_llep.offline.demo.pretraining import METRICS, WANDB_PROJECT


def write(
    trained: Trained, phases: Sequence[PhaseMark], world: str, seconds: float, out: Path
) -> None:
    """Write summary.json, demo.png and report.html, and print the table.

    Args:
        trained: what ran.
        phases: of it.
        world: layout and ranks, for people.
        seconds: that all took.
        out: folder.
    """
    figures = summarise(trained, phases) | {"layout": world, "seconds": seconds}
    parts = [f"steps {each.first_step} to {each.last_step} on {each.name}" for each in phases]
    report = make_report(
        trained,
        title=f"Plain expert parallelism and LLEP, same seed, same data ({world})",
        intro="The same mixture-of-experts model, seed and data, trained twice: "
        f"{', then '.join(parts)}. No auxiliary loss, no forced routing.",
        rows=make_rows(trained, figures),
        panels=make_panels(trained, figures, phases),
        columns=2,
        subject="The loss curves",
        figures=figures,
        how_measured=explain(figures, trained.device.name),
    )
    write_report(report, out, ("summary.json", "demo.png", "report.html"), WANDB_PROJECT)


def summarise(trained: Trained, phases: Sequence[PhaseMark]) -> dict[str, Any]:
    """The figures of the comparison, for summary.json.

    Step times, medians and lending are those of the last phase, where one domain is trained on
    alone; the other maxima are over both phases.
    """
    comparison = trained.comparison
    llep = {
        name.removeprefix(LLEP_PREFIX): curve.values
        for name, curve in comparison.other.curves.items()
        if name.startswith(LLEP_PREFIX)
    }
    last = slice(phases[-1].first_step - 1, phases[-1].last_step)
    before, after = llep["overload_factor_before"], llep["overload_factor_after"]
    most = (float(llep["max_tokens_before"].max()), float(llep["max_tokens_after"].max()))
    timed = timed_steps(comparison.reference.curve(STEP_TIME), phases)
    seconds, peaks = trained.step_seconds(timed), trained.peak_mib()
    of_steps = [find_worst([w.worst_of_steps for w in trained.watches[kind]]) for kind in SIDES]
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
        "step_time_ratio": seconds[0] / seconds[1],
        "step_time_ms": _by_side([each * 1e3 for each in seconds]),
        "step_time_over_steps": list(timed),
        "peak_memory_ratio": peaks[0] / peaks[1],
        "peak_memory_mib": _by_side(peaks),
        "peak_memory_of_steps_mib": _by_side(of_steps),
        "tokens_max_ratio": most[0] / most[1],
        "tokens_max": _by_side(most),
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


def make_rows(trained: Trained, summary: Mapping[str, Any]) -> list[Row]:
    """The table: one row a figure."""
    last = summary["phases"][-1]["name"]
    first_timed, last_timed = summary["step_time_over_steps"]

    def both(name: str) -> tuple[Any, Any]:
        found = summary[name]
        return found["plain"], found["llep"]

    def before_after(of: str) -> tuple[float, float]:
        return summary[f"imbalance_before_{of}"], summary[f"imbalance_after_{of}"]

    rows = [
        metric_rows(trained.comparison.results[0])[0],
        pair_row(
            "imbalance, worst step and layer", before_after("max"), note="1 is perfect balance"
        ),
        pair_row(f"imbalance, worst layer, median of {last}", before_after("median"), note=""),
        pair_row("most (token, expert) pairs a rank computed", both("tokens_max"), "{:.0f}"),
        pair_row(
            f"step time, median of steps {first_timed}-{last_timed}",
            both("step_time_ms"),
            "{:.0f} ms",
        ),
        pair_row("peak memory of the worst rank", both("peak_memory_mib"), "{:.0f} MiB"),
    ]
    of_steps = both("peak_memory_of_steps_mib")
    if None not in of_steps:
        rows.append(pair_row("  of which by the training steps", of_steps, "{:.0f} MiB"))
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
    trained: Trained, summary: Mapping[str, Any], phases: Sequence[PhaseMark]
) -> list[Panel]:
    """The picture."""
    comparison, llep = trained.comparison, trained.comparison.other
    panels = metric_panels(comparison, phases) + load_panels(llep, phases)
    before = llep.stacked(LLEP_PREFIX + "overload_factor_before")
    after = llep.stacked(LLEP_PREFIX + "overload_factor_after")
    if before is not None and after is not None:
        panels.append(
            LayersBeforeAfter(
                title="Imbalance of each layer, before balancing and after",
                steps=llep.curve(METRICS[0].name).steps,
                before=before,
                after=after,
                phases=phases,
            )
        )
    panels += step_time_panels(comparison, phases)
    of_steps = summary["peak_memory_of_steps_mib"]
    panels.append(
        Bars(
            title="Peak memory of the worst rank",
            unit="MiB",
            xlabel="MiB above Python and its libraries",
            values=trained.peak_mib(),
            parts=(of_steps["plain"], of_steps["llep"]),
            part_note="by the steps",
            names=comparison.names,
        )
    )
    return panels


def explain(summary: Mapping[str, Any], device: str) -> dict[str, str]:
    """How each figure was measured, for the page and summary.json; `device` is cpu or gpu."""
    first, last = summary["step_time_over_steps"]
    memory = f"{MEMORY[device]} The larger of both phases."
    if device == "cpu":
        memory += (
            " 'By the training steps' is the same less what the process held right before its "
            "first step."
        )
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


def _by_side(pair: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(SIDES, pair, strict=True))
