"""The processes of the benchmark, one a rank: check every method, weigh it, time all in turn.

What needs Megatron is imported when the device is chosen, and not before.

Letters: P ranks.
"""

import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from benchmarks.imbalance.data import LayerSizes, StepData, make_step
from benchmarks.imbalance.names import DISPATCH, FORCED, TRAIN
from benchmarks.imbalance.oracle import OracleError, Record, count_crossing
from benchmarks.imbalance.workloads import Routing, route, route_evenly
from megatron_llep.config import LLEPConfig
from megatron_llep.device import use_cpu_if_no_gpu
from megatron_llep.offline.ranks import run_ranks
from megatron_llep.offline.timing import take_turns

if TYPE_CHECKING:
    from benchmarks.imbalance.modes import DispatchMode, LayerMode

HISTORY = 8
"""Steps before the first one that runs, by which EPLB places experts."""

# The C library keeps freed memory for the next tensor, as torch does on GPUs: fresh pages would
# cost most where one rank has most tokens.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

Key = tuple[str, str, str]
"""Mode, workload, method."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks do."""

    sizes: LayerSizes
    modes: tuple[str, ...]
    workloads: tuple[str, ...]
    methods: Mapping[str, LLEPConfig | None]
    """By name, `FORCED` among them; the settings of those that plan."""
    steps: int
    rounds: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a method moved in one step, and where it computed; the same on all ranks."""

    pairs: list[int]
    """[P] computed on each rank."""
    crossing: int
    """Of these, pairs whose token came from another rank."""
    weight_numbers: int
    """Numbers of weights that ranks sent each other in forward."""
    gradient_numbers: int
    """Of their gradients, in backward."""
    lent: int
    """Experts lent."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank found, by `Key`."""

    seconds: dict[Key, list[list[float]]] = field(default_factory=dict)
    """Of each step of each round."""
    peak_bytes: dict[Key, int] = field(default_factory=dict)
    moved: dict[Key, list[Moved]] = field(default_factory=dict)
    """Of each step."""
    placed: dict[Key, int] = field(default_factory=dict)
    """Experts that were placed away from home, once."""
    off_by: dict[Key, float] = field(default_factory=dict)
    """Largest difference from the reference."""
    digests: dict[str, str] = field(default_factory=dict)
    """By workload: of all its routings."""
    pinned: bool = False
    """This rank has a core of its own."""


def check_machine(num_ranks: int) -> None:
    """Check that so many ranks can run here.

    Raises:
        ValueError: there are GPUs, but fewer than ranks.
    """
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and gpus < num_ranks:
        raise ValueError(
            f"--ep {num_ranks}: this machine has {gpus} GPUs; give as many, or hide them with "
            "CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )


def run_job(job: Job) -> list[Found]:
    """Run it on this machine, in new processes; what ranks found, in rank order.

    Raises:
        ProcessRaisedException: a rank failed, with an `OracleError` if a method went wrong.
    """
    os.environ |= _KEEP_MEMORY
    try:
        return run_ranks(_be_a_rank, job.sizes.num_ranks, job)
    finally:
        for name in _KEEP_MEMORY:
            del os.environ[name]


def _be_a_rank(rank: int, store: Path, job: Job) -> Found:
    P = job.sizes.num_ranks
    os.environ |= {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    device = use_cpu_if_no_gpu()
    cores = sorted(os.sched_getaffinity(0))
    pinned = device == "cpu" and len(cores) >= P
    if pinned:
        os.sched_setaffinity(0, {cores[rank]})
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    from megatron.core import parallel_state, tensor_parallel

    file_store = dist.FileStore(str(store), P)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=file_store, rank=rank, world_size=P)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=P, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = measure(rank, job, device, Found(pinned=pinned))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def measure(rank: int, job: Job, device: str, found: Found) -> Found:
    """All modes, workloads and methods, in a world of P ranks.

    Raises:
        OracleError: names mode, workload, method and step in which a method went wrong.
    """
    from benchmarks.imbalance import methods, modes, reference  # noqa: F401

    gc.collect()
    gc.freeze()  # what is imported needs no further look
    for mode in job.modes:
        for workload in job.workloads:
            started = time.perf_counter()
            case = _Case(rank, job, device, mode, workload)
            case.check(found)
            case.weigh(found)
            case.take_times(found)
            if rank == 0:
                seconds = time.perf_counter() - started
                print(f"{mode}, {workload}: {seconds:.0f} s", flush=True)
    return found


class _Case:
    """One workload in one mode: all methods, each in a layer of its own."""

    def __init__(self, rank: int, job: Job, device: str, mode: str, workload: str):
        self.rank, self.job, self.device = rank, job, device
        self.mode, self.workload = mode, workload
        steps = range(HISTORY, HISTORY + job.steps)
        self.history = [self._route(step) for step in range(HISTORY)]
        routings = [self._route(step) for step in steps]
        self.digest = " ".join(each.digest for each in routings)
        evenly = [
            route_evenly(routing, seed=job.seed, step=step)
            for routing, step in zip(routings, steps, strict=True)
        ]
        self.data = {
            is_even: [self._draw(*each) for each in zip(kind, steps, strict=True)]
            for is_even, kind in ((False, routings), (True, evenly))
        }
        self.runs = {method: self._build(method) for method in job.methods}

    def check(self, found: Found) -> None:
        """Hold every step of every method against the oracle; note what moved."""
        from benchmarks.imbalance.modes import MOMENTUM, choose_rate
        from benchmarks.imbalance.reference import Reference

        sizes, seed = self.job.sizes, self.job.seed
        found.digests[self.workload] = self.digest
        computes = self.mode != DISPATCH
        references = (
            {is_even: Reference(sizes, seed, self.device) for is_even in self.data}
            if computes
            else {}
        )
        for step in range(self.job.steps):
            expected = {
                is_even: reference.run(self.data[is_even][step])
                for is_even, reference in references.items()
            }
            if self.mode == TRAIN:
                for is_even, reference in references.items():
                    mean = {
                        name: each / sizes.num_ranks
                        for name, each in expected[is_even].gradients.items()
                    }
                    reference.descend(mean, choose_rate(sizes), MOMENTUM)
            for method, run in self.runs.items():
                is_even = method == FORCED
                data = self.data[is_even][step]
                try:
                    records, off_by = run.check(data, expected.get(is_even))
                    if computes:
                        run.compare_weights(references[is_even], step + 1)
                except OracleError as error:
                    raise OracleError(
                        f"{method} under {self.workload}, mode {self.mode}, step {step}: {error}"
                    ) from error
                key = (self.mode, self.workload, method)
                found.off_by[key] = max(found.off_by.get(key, 0.0), off_by)
                moved = describe_moved(run, records, data.routing)
                found.moved.setdefault(key, []).append(moved)
                found.placed[key] = run.subject.placed_experts()

    def weigh(self, found: Found) -> None:
        """Peak memory of each method: a new layer is built, and all steps run."""
        from benchmarks.imbalance.memory import measure_peak

        for method in self.job.methods:

            def work(method: str = method) -> None:
                run = self._build(method)
                for data in self.data[method == FORCED]:
                    run.prepare(data)
                    run.run(data)

            found.peak_bytes[self.mode, self.workload, method] = measure_peak(work)
            gc.collect()

    def take_times(self, found: Found) -> None:
        """All steps of all methods in every round, beginning with another method each time."""
        for method in self.job.methods:
            found.seconds[self.mode, self.workload, method] = []
        gc.collect()
        gc.disable()
        for method, counts in take_turns(list(self.job.methods), self.job.rounds):
            run, taken = self.runs[method], []
            for data in self.data[method == FORCED]:
                run.prepare(data)
                self._wait()
                start = time.perf_counter()
                run.run(data)
                self._wait_for_gpu()
                taken.append(time.perf_counter() - start)
            if counts:
                found.seconds[self.mode, self.workload, method].append(taken)
        gc.enable()

    def _wait(self) -> None:
        self._wait_for_gpu()
        dist.barrier()
        self._wait_for_gpu()  # NCCL's barrier is on the GPU

    def _wait_for_gpu(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _route(self, step: int) -> Routing:
        return route(self.workload, self.job.sizes, seed=self.job.seed, step=step)

    def _draw(self, routing: Routing, step: int) -> StepData:
        hidden, seed = self.job.sizes.hidden, self.job.seed
        return make_step(routing, hidden, self.rank, seed=seed, step=step, device=self.device)

    def _build(self, method: str) -> "DispatchMode | LayerMode":
        from benchmarks.imbalance.methods import build_subject
        from benchmarks.imbalance.modes import MODES

        subject = build_subject(
            method,
            self.job.sizes,
            self.job.seed,
            history=self.history,
            llep=self.job.methods[method],
        )
        return MODES[self.mode](subject, self.job.seed)


def describe_moved(
    run: "DispatchMode | LayerMode", records: Sequence[Record], routing: Routing
) -> Moved:
    """What one checked step moved."""
    weights, gradients = run.subject.weight_numbers() if run.moves_weights else (0, 0)
    plan = run.subject.plan
    return Moved(
        pairs=[len(each.token) for each in records],
        crossing=count_crossing(records, routing),
        weight_numbers=weights,
        gradient_numbers=gradients,
        lent=0 if plan is None else len(plan.transfers),
    )
