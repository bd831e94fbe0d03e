"""What the runs showed: TensorBoard logs and memory -> curves -> the summary.

Letters: N training steps (both phases), L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from demo_plan import Phase, Run
from demo_run import MemoryWatch

# Rounding: the two runs add the same numbers in another order. Over the first steps the loss then
# differs by some 1e-7. Later one token whose two best experts tie takes the other one, and training
# multiplies that difference; up to 1e-2 was seen after 70 steps at twice the demo's learning rate.
EARLY_STEPS = 20
EARLY_TOLERANCE = 1e-4
"""Largest relative difference of the loss in the first steps."""
LOSS_TOLERANCE = 3e-2
"""Largest relative difference of the loss at any step."""
WARM_UP_STEPS = 5
"""First steps of a phase, left out of the step times: allocators and caches still grow."""
LLEP_PREFIX = "moe/llep/"
GPU_PEAK = "peak-memory-worst-rank-bytes"


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One training, both phases; arrays over steps.

    loss: [N]; seconds: [N] of each step, nan at the first of a phase;
    peak_bytes: [phases], the worst rank's; step_bytes: [phases], the same above what the rank
    held before its first step, nan on GPUs;
    llep: metric -> [N] or, for `NAME_layers`, [L, N]; empty for plain EP.
    """

    loss: np.ndarray
    seconds: np.ndarray
    peak_bytes: np.ndarray
    step_bytes: np.ndarray
    llep: dict[str, np.ndarray]


def read_scalars(folder: Path) -> dict[str, np.ndarray]:
    """Read a TensorBoard folder: tag -> [steps, 2] of step and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: np.array([(event.step, event.value) for event in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }


def take_steps(scalars: dict[str, np.ndarray], tag: str, phase: Phase) -> np.ndarray:
    """Values of one tag at the phase's steps, [steps].

    Raises:
        RuntimeError: the log lacks the tag or a step of it.
    """
    wanted = np.arange(phase.first_step, phase.last_step + 1)
    points = scalars.get(tag)
    if points is None or not np.array_equal(points[:, 0].astype(int), wanted):
        raise RuntimeError(f"the TensorBoard log of phase {phase.name} lacks steps of {tag!r}")
    return points[:, 1]


def collect_curves(runs: Sequence[tuple[Run, MemoryWatch]]) -> Curves:
    """Join the phases of one kind of run.

    Raises:
        RuntimeError: a log is incomplete.
    """
    parts: dict[str, list] = {"loss": [], "seconds": [], "peak": [], "step": []}
    llep: dict[str, list] = {}
    for run, watch in runs:
        scalars = read_scalars(run.tensorboard)
        parts["loss"].append(take_steps(scalars, "lm loss", run.phase))
        # Megatron logs no time for the first step after a start.
        timed = replace(run.phase, first_step=run.phase.first_step + 1, steps=run.phase.steps - 1)
        parts["seconds"].append([np.nan, *take_steps(scalars, "iteration-time", timed)])
        if watch.peak:
            parts["peak"].append(max(watch.peak[r] - watch.libraries[r] for r in watch.peak))
            parts["step"].append(max(watch.peak[r] - watch.start[r] for r in watch.peak))
        else:
            parts["peak"].append(scalars[GPU_PEAK][-1, 1])
            parts["step"].append(np.nan)
        for tag in scalars:
            if tag.startswith(LLEP_PREFIX):
                values = take_steps(scalars, tag, run.phase)
                llep.setdefault(tag.removeprefix(LLEP_PREFIX), []).append(values)
    metrics = {name: np.concatenate(values) for name, values in llep.items()}
    return Curves(
        loss=np.concatenate(parts["loss"]),
        seconds=np.concatenate(parts["seconds"]),
        peak_bytes=np.array(parts["peak"], dtype=float),
        step_bytes=np.array(parts["step"], dtype=float),
        llep=_stack_layers(metrics),
    )


def _stack_layers(metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gather NAME_layer_0, NAME_layer_1, ... as NAME_layers, [L, N]."""
    result: dict[str, np.ndarray] = {}
    layers: dict[str, dict[int, np.ndarray]] = {}
    for name, values in metrics.items():
        stem, found, layer = name.rpartition("_layer_")
        if found:
            layers.setdefault(stem, {})[int(layer)] = values
        else:
            result[name] = values
    for stem, rows in layers.items():
        result[f"{stem}_layers"] = np.stack([rows[layer] for layer in sorted(rows)])
    return result


def compare_losses(plain: np.ndarray, llep: np.ndarray) -> np.ndarray:
    """Relative difference of two loss curves at each step, [N]; inf where one is not finite."""
    difference = np.abs(plain - llep) / np.abs(plain)
    return np.where(np.isfinite(difference), difference, np.inf)


def timed_steps(phase: Phase) -> slice:
    """The phase's steps whose time counts, as indices into [N]."""
    skip = min(WARM_UP_STEPS, phase.steps - 1)
    return slice(phase.first_step - 1 + skip, phase.last_step)


def summarise(plain: Curves, llep: Curves, phases: Sequence[Phase]) -> dict:
    """The figures of the comparison, as they go into summary.json.

    Step times, medians and lending are those of the last phase, where one domain is trained on
    alone; the other maxima are over both phases.
    """
    last = phases[-1]
    steps = slice(last.first_step - 1, last.last_step)
    timed = timed_steps(last)
    plain_s, llep_s = (float(np.median(curves.seconds[timed])) for curves in (plain, llep))
    before, after = llep.llep["overload_factor_before"], llep.llep["overload_factor_after"]
    tokens_before, tokens_after = llep.llep["max_tokens_before"], llep.llep["max_tokens_after"]
    difference = compare_losses(plain.loss, llep.loss)
    return {
        "loss_max_rel_diff": float(difference.max()),
        "loss_early_max_rel_diff": float(difference[:EARLY_STEPS].max()),
        "loss_early_tolerance": EARLY_TOLERANCE,
        "loss_early_steps": min(EARLY_STEPS, plain.loss.size),
        "loss_tolerance": LOSS_TOLERANCE,
        "loss_last": {"plain": float(plain.loss[-1]), "llep": float(llep.loss[-1])},
        "imbalance_before_max": float(before.max()),
        "imbalance_after_max": float(after.max()),
        "imbalance_before_median": float(np.median(before[steps])),
        "imbalance_after_median": float(np.median(after[steps])),
        "step_time_ratio": plain_s / llep_s,
        "step_time_ms": {"plain": plain_s * 1e3, "llep": llep_s * 1e3},
        "step_time_over_steps": [timed.start + 1, timed.stop],
        "peak_memory_ratio": float(plain.peak_bytes.max() / llep.peak_bytes.max()),
        "peak_memory_mib": _in_mib(plain.peak_bytes, llep.peak_bytes),
        "peak_memory_of_steps_mib": _in_mib(plain.step_bytes, llep.step_bytes),
        "tokens_max_ratio": float(tokens_before.max() / tokens_after.max()),
        "tokens_max": {"plain": float(tokens_before.max()), "llep": float(tokens_after.max())},
        "lent_experts_per_step": float(llep.llep["lent_experts"][steps].mean()),
        "lent_mib_per_step": float(llep.llep["lent_mib"][steps].mean()),
        "lent_mib_total": float(llep.llep["lent_mib"].sum()),
        "fallback_rate": float(llep.llep["fallback_rate"][steps].mean()),
        "plan_ms_per_step": float(llep.llep["plan_ms"][steps].mean()),
        "steps": int(plain.loss.size),
        "phases": [
            {"name": phase.name, "first_step": phase.first_step, "last_step": phase.last_step}
            for phase in phases
        ],
    }


def losses_agree(summary: dict) -> bool:
    """Whether the two loss curves are the same within the tolerances."""
    return (
        summary["loss_early_max_rel_diff"] <= summary["loss_early_tolerance"]
        and summary["loss_max_rel_diff"] <= summary["loss_tolerance"]
    )


def _in_mib(plain: np.ndarray, llep: np.ndarray) -> dict[str, float | None]:
    return {
        kind: None if np.isnan(values).any() else float(values.max() / 2**20)
        for kind, values in (("plain", plain), ("llep", llep))
    }
