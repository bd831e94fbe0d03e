"""The critical path of an MoE layer: each rank's expert work in turn on one device, the worst rank.

Ranks are run one after another, not at once. Their expert work is measured; token exchange, weights
lent and gradients returned are those of the cost model, from data sheets or a calibration;
planning is measured on this host.
"""

import gc
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gpu_checks.experts import Experts, Slab
from gpu_checks.rank_work import NUM_RANKS, PLAIN, Case, Load, make_cases
from gpu_checks.results import check_experts
from gpu_checks.stopwatch import Pass, estimate_bytes, run_once
from megatron_llep.offline.simulator.models import ModelShape
from megatron_llep.offline.timing import take_turns
from megatron_llep.planner import Topology
from megatron_llep.planner.cost.model import CostModel

_HEADROOM = 1.08
"""Of the device's memory, for what the allocator cannot reuse."""
_MOST_TRIES = 3
"""A pass that had to wait for memory from the driver is repeated: it now lies ready."""


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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model, workload and method. Seconds and bytes are those of the worst rank."""

    model: str
    experts: str
    """Which grouped GEMM."""
    workload: str
    method: str
    imbalance: float
    """Most loaded rank / mean, as it ran."""
    lent: int
    """Experts lent, all ranks."""
    forward_seconds: float
    """Measured: the experts of the rank slowest in forward."""
    expert_seconds: float
    """Measured: forward and backward, of the rank slowest in both together."""
    exchange_seconds: float
    """Stated: four token exchanges."""
    lending_seconds: float
    """Stated: what is not hidden of weights lent."""
    returning_seconds: float
    """Stated: likewise of gradients returned."""
    plan_seconds: float
    """Measured on this host."""
    peak_bytes: int | None

    @property
    def total_seconds(self) -> float:
        """The layer, forward and backward."""
        stated = self.exchange_seconds + self.lending_seconds + self.returning_seconds
        return self.expert_seconds + stated + self.plan_seconds

    @property
    def forward_total_seconds(self) -> float:
        """The layer's forward: two of the four exchanges, lending, no return."""
        stated = self.exchange_seconds / 2 + self.lending_seconds
        return self.forward_seconds + stated + self.plan_seconds


class TooLargeError(ValueError):
    """A model's work does not fit on this device."""


def measure_model(job: PathJob, model: ModelShape, kind: str, experts: Experts) -> list[Row]:
    """Run every workload under every method for one model, on one kind of grouped GEMM.

    Raises:
        TooLargeError: the largest rank does not fit on the device.
        RuntimeError: the experts compute something else.
    """
    shape = model.layer
    methods = (PLAIN, *dict.fromkeys(job.planners))
    cases = {
        workload: make_cases(shape, workload, methods, model.tokens_per_rank)
        for workload in dict.fromkeys(job.workloads)
    }
    loads = {
        workload: list(dict.fromkeys(load for case in of_one for load in case.chosen))
        for workload, of_one in cases.items()
    }
    every = list(itertools.chain.from_iterable(loads.values()))
    slots, pairs = max(map(len, every)), max(map(sum, every))
    check_fits(model, slots=slots, pairs=pairs, device=job.device)
    slab = Slab.allocate(
        slots=slots,
        hidden=shape.hidden,
        ffn=shape.ffn_hidden,
        dtype=torch.bfloat16,
        device=job.device,
    )
    rows = torch.empty(pairs, shape.hidden, dtype=torch.bfloat16, device=job.device).normal_()
    num_native = shape.num_experts // NUM_RANKS
    for load in {max(every, key=sum), max(every, key=len)}:
        check_experts(experts, slab.first(len(load)), rows[: sum(load)], list(load), num_native)
    found, done = [], 0
    for workload, of_one in cases.items():
        timed = time_loads(loads[workload], experts, slab, rows, job.rounds, num_native)
        found += [_make_row(case, timed, model, kind, job.cost) for case in of_one]
        done += sum(map(sum, loads[workload]))
        share = done / sum(map(sum, every))
        print(f"  {model.name}, {kind}, {workload}: {share:4.0%} of the pairs are done", flush=True)
    return found


def time_loads(
    loads: Sequence[Load],
    experts: Experts,
    slab: Slab,
    rows: torch.Tensor,
    rounds: int,
    num_native: int,
) -> dict[Load, Pass]:
    """Run every load in every round; of each the pass in the middle, with the highest peak."""
    passes: dict[Load, list[Pass]] = {load: [] for load in loads}
    for load, counts in take_turns(loads, rounds):
        for _ in range(_MOST_TRIES):
            one = run_once(
                experts, slab.first(len(load)), rows[: sum(load)], list(load), num_native
            )
            if not one.device_allocations:
                break
        if counts:
            passes[load].append(one)
    return {load: _take_median(of_one) for load, of_one in passes.items()}


def check_fits(model: ModelShape, *, slots: int, pairs: int, device: torch.device) -> None:
    """Refuse a model whose largest rank does not fit on the device.

    Raises:
        TooLargeError: says how much is needed, how much is there, and which size would fit.
    """
    if device.type != "cuda":
        return
    gc.collect()  # modules of the kind before may refer to themselves
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    shape = model.layer

    def need(pairs: int) -> float:
        sizes = {"hidden": shape.hidden, "ffn": shape.ffn_hidden}
        return _HEADROOM * estimate_bytes(slots=slots, pairs=pairs, **sizes)

    if need(pairs) <= free:
        return
    fixed = need(0)
    room = max(0, int((free - fixed) / (need(pairs) - fixed) * model.tokens_per_rank))
    remedy = f"try --tokens {room // 1024 * 1024}" if room >= 1024 else "its weights alone fill it"
    raise TooLargeError(
        f"the largest rank needs {need(pairs) / 2**30:.0f} GiB at "
        f"{model.tokens_per_rank} tokens a rank, {free / 2**30:.0f} GiB are free; {remedy}"
    )


def _take_median(passes: Sequence[Pass]) -> Pass:
    totals = [each.seconds for each in passes]
    middle = passes[totals.index(statistics.median_low(totals))]
    return replace(middle, peak_bytes=_find_peak(passes))


def _find_peak(passes: Sequence[Pass]) -> int | None:
    return max((each.peak_bytes for each in passes if each.peak_bytes is not None), default=None)


def _make_row(
    case: Case, timed: dict[Load, Pass], model: ModelShape, kind: str, cost: CostModel
) -> Row:
    ranks = [timed[load] for load in case.chosen]
    stated = cost.predict_layer(case.plan, case.counts, model.layer, Topology())
    return Row(
        model=model.name,
        experts=kind,
        workload=case.workload,
        method=case.method,
        imbalance=case.plan.imbalance_after,
        lent=len(case.plan.transfers),
        forward_seconds=max(each.forward_seconds for each in ranks),
        expert_seconds=max(each.seconds for each in ranks),
        exchange_seconds=stated.exchange,
        lending_seconds=stated.lending,
        returning_seconds=stated.returning,
        plan_seconds=case.plan_seconds,
        peak_bytes=_find_peak(ranks),
    )
