"""Sections critical path and memory: which models, on which grouped GEMMs, and the verdicts."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gpu_checks.critical_path import Row, TooLargeError, measure_model
from gpu_checks.demands import (
    BALANCED,
    find_heavy,
    find_slow,
    format_memory_table,
    format_time_table,
)
from gpu_checks.environment import is_installed
from gpu_checks.experts import Experts, run_apart, run_together
from gpu_checks.rank_work import PLAIN
from gpu_checks.section import Section
from gpu_checks.te_experts import TransformerEngineExperts
from megatron_llep.offline.simulator.models import ModelShape
from megatron_llep.planner.cost.model import CostModel

KINDS: dict[str, Callable[[], Experts]] = {
    "grouped_mm": lambda: run_apart,
    "one_slab": lambda: run_together,
    "te": TransformerEngineExperts,
}
"""Ways to compute a rank's experts, each made anew for a model. `one_slab` is none of LLEP's."""


@dataclass(frozen=True, kw_only=True)
class PathJob:
    """What to measure on the critical path."""

    models: tuple[ModelShape, ...]
    kinds: tuple[str, ...]
    workloads: tuple[str, ...]
    planners: tuple[str, ...]
    cost: CostModel
    device: torch.device
    rounds: int
    judged: bool
    """Whether the demands apply: a GPU, the paper's sizes and its hottest workload."""


def shrink(model: ModelShape) -> ModelShape:
    """The same model, tiny."""
    layer = dataclasses.replace(model.layer, hidden=64, ffn_hidden=32, num_experts=32, top_k=2)
    return dataclasses.replace(model, layer=layer, tokens_per_rank=64)


def list_kinds() -> tuple[str, ...]:
    """Of `KINDS`, those whose packages are installed."""
    return ("grouped_mm", "te") if is_installed("transformer_engine") else ("grouped_mm",)


def measure_paths(job: PathJob) -> tuple[list[Row], list[str]]:
    """All rows, and what was refused because it does not fit on the device."""
    rows: list[Row] = []
    refused: list[str] = []
    workloads = tuple(dict.fromkeys((BALANCED, *job.workloads)))
    for model in job.models:
        for kind in job.kinds:
            try:
                rows += measure_model(
                    model,
                    experts=KINDS[kind](),
                    experts_name=kind,
                    workloads=workloads,
                    methods=(PLAIN, *dict.fromkeys(job.planners)),
                    cost=job.cost,
                    device=job.device,
                    rounds=job.rounds,
                )
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
        "measured; plan is measured on this host.\n"
        "speed-up: total of plain / of the method. forward: the same for forward alone, which is "
        "what the paper measured. experts: the same for the measured part. paper: Figure 4.\n"
        "Loads much smaller than the L2 cache may be found in it."
    )
    return _judge("critical path", job, rows, [*refused, *find_slow(rows)])


def judge_memory(job: PathJob, rows: Sequence[Row]) -> Section:
    """Print peak memory and hold it to 10% above balanced."""
    known = [row for row in rows if row.peak_bytes is not None]
    if not known:
        reason = "torch counts allocated memory on GPUs only"
        return Section(name="memory", state="skipped", reason=reason)
    print(format_memory_table(known))
    print(
        "Most memory allocated by torch for the experts of one rank: weights and fp32 gradients of "
        "native and lent experts, their input, and what forward and backward allocate. Buffers of "
        "the exchanges are not in it."
    )
    return _judge("memory", job, known, find_heavy(known))


def _judge(name: str, job: PathJob, rows: Sequence[Row], short: list[str]) -> Section:
    data = {"rows": [dataclasses.asdict(row) for row in rows], "short": short}
    if not job.judged:
        reason = "the demands are for GPUs, the paper's sizes and its hottest workload"
        return Section(name=name, state="not judged", reason=reason, data=data)
    return Section(
        name=name, state="FAILED" if short else "passed", reason="; ".join(short), data=data
    )
