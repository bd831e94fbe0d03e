"""Sections critical path and memory: which models, on which grouped GEMMs, and the verdicts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from gpu_checks.critical_path import PathJob, Row, TooLargeError, measure_model
from gpu_checks.demands import find_heavy, find_slow, format_memory_table, format_time_table
from gpu_checks.environment import is_installed
from gpu_checks.experts import Experts, run_apart, run_together
from gpu_checks.section import Section, SkippedError, judge
from gpu_checks.te_experts import TransformerEngineExperts
from megatron_llep.offline.simulator.models import ModelShape

KINDS: dict[str, Callable[[], Experts]] = {
    "grouped_mm": lambda: run_apart,
    "one_slab": lambda: run_together,
    "te": TransformerEngineExperts,
}
"""Ways to compute a rank's experts, each made anew for a model. `one_slab` is none of LLEP's."""


def shrink(model: ModelShape) -> ModelShape:
    """The same model, tiny."""
    layer = replace(model.layer, hidden=64, ffn_hidden=32, num_experts=32, top_k=2)
    return replace(model, layer=layer, tokens_per_rank=64)


def list_kinds() -> tuple[str, ...]:
    """Of `KINDS`, those whose packages are installed."""
    return ("grouped_mm", "te") if is_installed("transformer_engine") else ("grouped_mm",)


def measure_paths(job: PathJob) -> tuple[list[Row], list[str]]:
    """All rows, and what was refused because it does not fit on the device."""
    rows: list[Row] = []
    refused: list[str] = []
    for model in job.models:
        for kind in job.kinds:
            try:
                rows += measure_model(job, model, kind, KINDS[kind]())
            except (TooLargeError, torch.OutOfMemoryError) as error:
                refused.append(f"{model.name}, {kind}: {str(error).splitlines()[0]}")
                print(f"  refused: {refused[-1]}", flush=True)
    return rows, refused


def judge_time(job: PathJob, rows: Sequence[Row], refused: Sequence[str]) -> Section:
    """Print the critical path and hold it to the demands."""
    if rows:
        print(format_time_table(rows))
    print(
        f"Ranks were run one after another on one device; experts are measured on the worst rank "
        f"(forward and backward, median of {job.rounds}). A rank that has no more to do than "
        "another in any slot is not run, equal loads are timed once: where a planner lends "
        "nothing its experts are plain's.\n"
        f"Exchange, lend and return are predictions of the cost model ({job.cost.machine}), not "
        "measured; plan is measured on this host. All in ms but where it says us.\n"
        "speed-up: total of plain / of the method. forward: the same for forward alone, which is "
        "what the paper measured. experts: the same for the measured part. paper: Figure 4.\n"
        "Loads much smaller than the L2 cache may be found in it."
    )
    return _judge("critical path", job, rows, [*refused, *find_slow(rows)])


def judge_memory(job: PathJob, rows: Sequence[Row]) -> Section:
    """Print peak memory and hold it to 10% above balanced.

    Raises:
        SkippedError: it is not known.
    """
    known = [row for row in rows if row.peak_bytes is not None]
    if not known:
        raise SkippedError("torch counts allocated memory on GPUs only")
    print(format_memory_table(known))
    print(
        "Most memory allocated by torch for the experts of one rank: weights and fp32 gradients of "
        "native and lent experts, their input, and what forward and backward allocate. Buffers of "
        "the exchanges are not in it."
    )
    return _judge("memory", job, known, find_heavy(known))


def _judge(name: str, job: PathJob, rows: Sequence[Row], short: list[str]) -> Section:
    section = judge(name, short, {"rows": [asdict(row) for row in rows], "short": short})
    if job.judged:
        return section
    reason = "the demands are for GPUs, the paper's sizes and its hottest workload"
    return replace(section, state="not judged", reason=reason)
