"""The critical path of an MoE layer: each rank's expert work in turn on one device, the worst rank.

Ranks are run one after another, not at once. Their expert work is measured; token exchange, weights
lent and gradients returned are those of the cost model, from data sheets or a calibration;
planning is measured on this host.
"""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_checks.experts import Experts, Slab
from gpu_checks.rank_work import NUM_RANKS, Case, Load, choose_loads, make_cases
from gpu_checks.results import check_experts
from gpu_checks.stopwatch import Pass, estimate_bytes, run_once
from megatron_llep.offline.simulator.models import ModelShape
from megatron_llep.planner import Topology
from megatron_llep.planner.cost.model import CostModel

_HEADROOM = 1.08
"""Of the device's memory, for what the allocator cannot reuse."""
_MOST_TRIES = 3
"""A pass that had to wait for memory from the driver is repeated: it now lies ready."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One rank's load: medians over the rounds."""

    forward_seconds: float
    backward_seconds: float
    peak_bytes: int | None


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
        return (
            self.expert_seconds
            + self.exchange_seconds
            + self.lending_seconds
            + self.returning_seconds
            + self.plan_seconds
        )

    @property
    def forward_total_seconds(self) -> float:
        """The layer's forward: two of the four exchanges, lending, no return."""
        return (
            self.forward_seconds
            + self.exchange_seconds / 2
            + self.lending_seconds
            + self.plan_seconds
        )


class TooLargeError(ValueError):
    """A model's work does not fit on this device."""


def measure_model(
    model: ModelShape,
    *,
    experts: Experts,
    experts_name: str,
    workloads: Sequence[str],
    methods: Sequence[str],
    cost: CostModel,
    device: torch.device,
    rounds: int,
) -> list[Row]:
    """Run every workload under every method for one model.

    Raises:
        TooLargeError: the largest rank does not fit on the device.
        RuntimeError: the experts compute something else.
    """
    shape = model.layer
    cases = {
        workload: make_cases(shape, workload, methods, model.tokens_per_rank)
        for workload in workloads
    }
    loads = {
        workload: list(
            dict.fromkeys(load for case in of_one for load in choose_loads(case.loads()))
        )
        for workload, of_one in cases.items()
    }
    every = [load for of_one in loads.values() for load in of_one]
    slots, pairs = max(map(len, every)), max(map(sum, every))
    check_fits(model, slots=slots, pairs=pairs, device=device)
    slab = Slab.allocate(
        slots=slots,
        hidden=shape.hidden,
        ffn=shape.ffn_hidden,
        dtype=torch.bfloat16,
        device=device,
    )
    rows = torch.empty(pairs, shape.hidden, dtype=torch.bfloat16, device=device).normal_()
    num_native = shape.num_experts // NUM_RANKS
    for load in {max(every, key=sum), max(every, key=len)}:
        check_experts(experts, slab.first(len(load)), rows[: sum(load)], list(load), num_native)
    progress = _Progress(sum(map(sum, every)), f"{model.name}, {experts_name}")
    found = []
    for workload, of_one in cases.items():
        timed = time_loads(loads[workload], experts, slab, rows, rounds, num_native=num_native)
        for case in of_one:
            found.append(_make_row(case, timed, model, experts_name, cost))
        progress.advance(workload, sum(map(sum, loads[workload])), len(loads[workload]))
    return found


def time_loads(
    loads: Sequence[Load],
    experts: Experts,
    slab: Slab,
    rows: torch.Tensor,
    rounds: int,
    *,
    num_native: int,
) -> dict[Load, Timed]:
    """Run every load in every round, beginning with another one each time."""
    passes: dict[Load, list[Pass]] = {load: [] for load in loads}
    for turn in range(1 + rounds):
        shift = turn % len(loads)
        for load in [*loads[shift:], *loads[:shift]]:
            for _ in range(_MOST_TRIES):
                one = run_once(
                    experts, slab.first(len(load)), rows[: sum(load)], list(load), num_native
                )
                if not one.device_allocations:
                    break
            if turn:  # the first one warms up
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


def _take_median(passes: Sequence[Pass]) -> Timed:
    """The pass in the middle by total time."""
    totals = [each.forward_seconds + each.backward_seconds for each in passes]
    middle = passes[totals.index(statistics.median_low(totals))]
    peaks = [each.peak_bytes for each in passes if each.peak_bytes is not None]
    return Timed(
        forward_seconds=middle.forward_seconds,
        backward_seconds=middle.backward_seconds,
        peak_bytes=max(peaks) if peaks else None,
    )


def _make_row(
    case: Case, timed: dict[Load, Timed], model: ModelShape, experts_name: str, cost: CostModel
) -> Row:
    ranks = [timed[load] for load in choose_loads(case.loads())]
    stated = cost.predict_layer(case.plan, case.counts, model.layer, Topology())
    peaks = [each.peak_bytes for each in ranks if each.peak_bytes is not None]
    return Row(
        model=model.name,
        experts=experts_name,
        workload=case.workload,
        method=case.method,
        imbalance=case.plan.imbalance_after,
        lent=len(case.plan.transfers),
        forward_seconds=max(each.forward_seconds for each in ranks),
        expert_seconds=max(each.forward_seconds + each.backward_seconds for each in ranks),
        exchange_seconds=stated.exchange,
        lending_seconds=stated.lending,
        returning_seconds=stated.returning,
        plan_seconds=case.plan_seconds,
        peak_bytes=max(peaks) if peaks else None,
    )


class _Progress:
    """Says after each workload how much time is left, by the pairs that were computed."""

    def __init__(self, pairs: int, what: str):
        self._left = self._all = pairs
        self._what = what
        self._start = time.perf_counter()

    def advance(self, workload: str, pairs: int, ranks: int) -> None:
        self._left -= pairs
        taken = time.perf_counter() - self._start
        left = taken / (self._all - self._left) * self._left
        print(f"  {self._what}: {workload}, {ranks} loads run; {left:.0f} s left", flush=True)
