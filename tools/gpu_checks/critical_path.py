"""The critical path of an MoE layer: each rank's layer in turn on one device, the slowest counts.

Letters: P ranks, E experts.

Measured is the whole layer of a rank, with planning, placing, packing and experts. What one process
cannot have, links and other ranks, is added from a cost model, or missing: see `METHOD`.
"""

import gc
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpu_checks.demands import (
    PLAIN,
    Pass,
    Row,
    find_heavy,
    find_slow,
    format_memory_table,
    format_time_table,
)
from gpu_checks.environment import is_installed
from gpu_checks.section import Section, SkippedError, judge, require
from megatron_llep.device import use_cpu_if_no_gpu
from megatron_llep.offline.simulator.models import ModelShape
from megatron_llep.offline.timing import take_turns
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner import Plan, Topology, make_plan
from megatron_llep.planner.cost.model import CostModel

if TYPE_CHECKING:
    from gpu_checks.layer_run import RankLayers

KINDS = ("grouped_mm", "te")
NUM_RANKS = 8
"""P, as in the paper's Figure 4."""
METHOD = f"""\
Megatron's MoE layer, plain and with LLEP, forward and backward, with the same experts and the same
routing of all {NUM_RANKS} ranks, one rank after another alone on one device. By CUDA events,
medians of rounds after a warm-up, methods in turn. Of each case the ranks are run that have most
pairs, most experts in use and most experts lent or borrowed; the slowest one counts.
In it: counting, planning, packing and unpacking lent weights, placing, gathering, sorting tokens,
experts, their weight gradients in fp32, adding what returns. Not in it: the router, attention;
activations are not fused.
The process group is a stand-in: no byte crosses a link and no rank waits for another. What would
arrive, tokens as well as lent weights and gradients, is random numbers that the device writes into
the same buffers; so results are not compared here: section correctness does.
exchange, lend, return: what links would add, by a cost model: not measured. Lending counts as
hidden behind token exchanges alone, though it may be behind experts, too.
idle: the layer's time less the time in which torch's profiler saw a kernel or copy on the device:
how long it waited for the host. host: from the counts, or the plan's start, to the call of the
token exchange."""


@dataclass(frozen=True, kw_only=True)
class PathJob:
    """What to measure on the critical path."""

    models: tuple[ModelShape, ...]
    kinds: tuple[str, ...]
    workloads: tuple[str, ...]
    planners: tuple[str, ...]
    cost: CostModel
    rounds: int
    judged: bool
    """Whether the demands apply: a GPU, the paper's sizes and its hottest workload."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One workload under plain expert parallelism or a planner, and what was found."""

    workload: str
    method: str
    counts: np.ndarray
    """[P, E]."""
    plan: Plan
    passes: dict[int, Pass]
    """By rank."""


def list_kinds() -> tuple[str, ...]:
    """Of `KINDS`, those whose packages are installed."""
    return KINDS if is_installed("transformer_engine") else KINDS[:1]


def shrink(model: ModelShape) -> ModelShape:
    """The same model, tiny."""
    layer = replace(model.layer, hidden=64, ffn_hidden=32, num_experts=32, top_k=2)
    return replace(model, layer=layer, tokens_per_rank=64)


def make_case(model: ModelShape, workload: str, method: str) -> Case:
    """Plan a workload; 95% of the tokens are 95% of all pairs, as in the published benchmark."""
    counts = make_counts(
        workload,
        num_ranks=NUM_RANKS,
        num_experts=model.layer.num_experts,
        tokens_per_rank=model.tokens_per_rank * model.layer.top_k,
        top_k=1,
    )
    options = {"planner": "exact", "max_foreign": 0} if method == PLAIN else {"planner": method}
    plan = make_plan(counts, **options)
    return Case(workload=workload, method=method, counts=counts, plan=plan, passes={})


def choose_ranks(plan: Plan) -> list[int]:
    """The ranks with most pairs, most experts in use, and most experts lent or borrowed."""
    moved = np.bincount(plan.transfers[:, 1:].ravel(), minlength=plan.num_ranks)
    most = (plan.load_per_rank_after, (plan.quota > 0).sum(axis=0), moved)
    return sorted({int(each.argmax()) for each in most if each.any()})


def measure_paths(job: PathJob) -> tuple[list[Row], list[str]]:
    """All rows, and what was refused because it does not fit on the device."""
    require("megatron.core")
    use_cpu_if_no_gpu()
    warnings.simplefilter("ignore")  # Megatron's, of packages that are not needed here
    rows: list[Row] = []
    refused: list[str] = []
    methods = dict.fromkeys((PLAIN, *job.planners))
    for model, kind in itertools.product(job.models, job.kinds):
        cases = [
            make_case(model, workload, method)
            for workload in dict.fromkeys(job.workloads)
            for method in methods
        ]
        for rank in range(NUM_RANKS):
            mine = [case for case in cases if rank in choose_ranks(case.plan)]
            if mine:
                refused += measure_rank(job, model, kind, rank, mine)
        for case in cases:
            if set(case.passes) == set(choose_ranks(case.plan)):
                rows.append(make_row(job, model, kind, case))
    return rows, refused


def measure_rank(
    job: PathJob, model: ModelShape, kind: str, rank: int, cases: Sequence[Case]
) -> list[str]:
    """Run one rank's layers in all these cases; returns what does not fit on the device."""
    from gpu_checks.layer_run import RankLayers  # imports Megatron, after the device is chosen
    from megatron_llep.offline.one_rank import be_one_rank

    gc.collect()  # the layers before may refer to themselves
    torch.cuda.empty_cache()
    before, refused = torch.cuda.memory_allocated(), []
    with be_one_rank(rank, NUM_RANKS):
        layers = RankLayers(model, kind, rank, NUM_RANKS)
        for workload, of_one in itertools.groupby(cases, key=lambda case: case.workload):
            print(f"  {model.name}, {kind}, rank {rank}: {workload}", flush=True)
            try:
                _measure_workload(job, layers, rank, list(of_one), before)
            except torch.OutOfMemoryError as error:
                what = f"{model.name}, {kind}, rank {rank}, {workload}"
                refused.append(f"{what}: try fewer --tokens: {str(error).splitlines()[0]}")
                print(f"  refused: {refused[-1]}", flush=True)
    return refused


def _measure_workload(
    job: PathJob, layers: "RankLayers", rank: int, cases: Sequence[Case], before: int
) -> None:
    """Run some methods in turn; of each the pass in the middle, with the highest peak."""
    layers.route(cases[0].counts)
    passes: dict[Case, list[Pass]] = {case: [] for case in cases}
    for case, counts in take_turns(cases, job.rounds):
        one = layers.run(case.method)
        assert layers.lent == len(case.plan.transfers), "the layer's plan is another"
        if counts:
            passes[case].append(one)
    for case, taken in passes.items():
        middle = sorted(taken, key=lambda one: one.layer_seconds)[job.rounds // 2]
        busy = layers.find_busy_seconds(case.method)
        peaks = [one.peak_bytes - before for one in taken if one.peak_bytes is not None]
        case.passes[rank] = replace(
            middle,
            idle_seconds=None if busy is None else max(0.0, middle.layer_seconds - busy),
            peak_bytes=max(peaks, default=None),
        )


def make_row(job: PathJob, model: ModelShape, kind: str, case: Case) -> Row:
    """The slowest rank, and what links would add; copies beside them are in what was measured."""
    rank, slowest = max(case.passes.items(), key=lambda item: item[1].layer_seconds)
    peaks = [one.peak_bytes for one in case.passes.values() if one.peak_bytes is not None]
    links = replace(job.cost, copy_bytes_per_second=1e18)
    stated = links.predict_layer(case.plan, case.counts, model.layer, Topology())
    return Row(
        **vars(replace(slowest, peak_bytes=max(peaks, default=None))),
        model=model.name,
        experts=kind,
        workload=case.workload,
        method=case.method,
        rank=rank,
        imbalance=case.plan.imbalance_after,
        lent=len(case.plan.transfers),
        exchange_seconds=stated.exchange,
        lending_seconds=stated.lending,
        returning_seconds=stated.returning,
    )


def judge_time(job: PathJob, rows: Sequence[Row], refused: Sequence[str]) -> Section:
    """Print the critical path and hold it to the demands."""
    if rows:
        print(format_time_table(rows))
    print(f"{METHOD}\nCost model: {job.cost.machine}.")
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
    print("Most memory that torch allocated for the layer of a rank in these runs, its input too.")
    return _judge("memory", job, known, find_heavy(known))


def _judge(name: str, job: PathJob, rows: Sequence[Row], short: list[str]) -> Section:
    section = judge(name, short, {"rows": [asdict(row) for row in rows], "short": short})
    if job.judged:
        return section
    reason = "the demands are for GPUs, the paper's sizes and its hottest workload"
    return replace(section, state="not judged", reason=reason)
