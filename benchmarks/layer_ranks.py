"""The processes of the layer benchmark: each is one rank, on a core of its own."""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_llep.config import LLEPConfig
from megatron_llep.device import use_cpu_if_no_gpu
from megatron_llep.device.memory import (
    get_peak_resident_bytes,
    get_resident_bytes,
    reset_peak_resident_bytes,
)
from megatron_llep.offline.ranks import run_ranks
from megatron_llep.offline.timing import take_turns
from megatron_llep.offline.workloads import make_counts, route_tokens
from megatron_llep.planner import Plan, make_plan, sends

# Freed memory is kept for the next tensor, as torch does on GPUs. By default fresh pages would be
# asked for each large tensor, which costs most where one rank has most tokens: plain EP under skew.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
# Every larger tensor has pages of its own, given back when it is freed: the peak is then that of
# the tensors, not of the allocator's habits.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}

PLAIN, BALANCED = "plain", "balanced"
LIMIT = "limit"
"""Plain Megatron with another router: the tokens that `exact` computes on a borrower go to an
expert that is at home there. The same work on every rank, and nothing lent: what a plan could reach
at most, on these cores, if lending cost nothing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks do."""

    sizes: dict[str, int]
    """Fields of layer_case.Sizes, which cannot be imported before the device is chosen."""
    variants: dict[str, LLEPConfig | None]
    """By name; None is plain Megatron."""
    workloads: tuple[str, ...]
    rounds: int
    seed: int = 0
    with_limit: bool = True
    """Whether `LIMIT` runs too."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank found, by (workload, variant)."""

    seconds: dict[tuple[str, str], list[float]]
    """Of each round, with `LIMIT` if it ran."""
    peak_bytes: dict[tuple[str, str], int]
    """Most memory that the layer took, with its weights and gradients, above the libraries."""
    plans: dict[tuple[str, str], Plan]
    """Of the LLEP variants."""


def measure_ranks(job: Job) -> list[Found]:
    """Measure times, then, in new processes, memory; results in rank order.

    Raises:
        ValueError: fewer cores than ranks.
    """
    timed = time_ranks(job)
    weighed = _start(_weigh, job, _GIVE_BACK)
    return [
        Found(seconds=a.seconds, plans=a.plans, peak_bytes=b.peak_bytes)
        for a, b in zip(timed, weighed, strict=True)
    ]


def time_ranks(job: Job) -> list[Found]:
    """Measure times alone; results in rank order.

    Raises:
        ValueError: fewer cores than ranks.
    """
    P, cores = job.sizes["num_ranks"], len(os.sched_getaffinity(0))
    if cores < P:
        raise ValueError(f"{P} ranks need a core each, this process may use {cores}")
    return _start(_take_times, job, _KEEP_MEMORY)


def _start(
    measure: Callable[[int, Job], Found], job: Job, allocator: dict[str, str]
) -> list[Found]:
    """Run all ranks; `allocator` are variables that the C library reads when a process starts."""
    os.environ |= allocator
    try:
        return run_ranks(_be_a_rank, job.sizes["num_ranks"], job, measure)
    finally:
        for name in allocator:
            del os.environ[name]


def _be_a_rank(rank: int, store: Path, job: Job, measure: Callable[[int, Job], Found]) -> Found:
    os.environ |= {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    use_cpu_if_no_gpu()
    from megatron.core import parallel_state, tensor_parallel

    world = job.sizes["num_ranks"]
    file_store = dist.FileStore(str(store), world)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=world, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = measure(rank, job)
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def _take_times(rank: int, job: Job) -> Found:
    """Every variant in every round, beginning with another one each time."""
    from benchmarks.layer_case import BenchLayer, Sizes

    sizes = Sizes(**job.sizes)
    layers = {name: BenchLayer(sizes, rank, llep) for name, llep in job.variants.items()}
    if job.with_limit:
        layers[LIMIT] = BenchLayer(sizes, rank, None)
    names = list(layers)
    found = Found(seconds={}, peak_bytes={}, plans={})
    for workload in job.workloads:
        started = time.perf_counter()
        experts = _choose(rank, job, workload)
        for name, llep in job.variants.items():
            layer = layers[name]
            layer.route(experts)
            if llep is not None:
                dispatcher = layer.module.token_dispatcher
                planned = dispatcher.plan(dispatcher.start_count(layer.get_routing_map()))
                found.plans[workload, name] = planned.plan
        if job.with_limit:
            layers[LIMIT].route(choose_as_if_lent(rank, job, workload))
        found.seconds.update({(workload, name): [] for name in names})
        for name, counts in take_turns(names, job.rounds):
            dist.barrier()
            start = time.perf_counter()
            layers[name].run()
            taken = time.perf_counter() - start
            if counts:
                found.seconds[workload, name].append(taken)
        if rank == 0:
            print(f"{workload}: {time.perf_counter() - started:.0f} s", flush=True)
    return found


def _weigh(rank: int, job: Job) -> Found:
    """One variant at a time: the process holds its layer and nothing else of the benchmark."""
    from benchmarks.layer_case import BenchLayer, Sizes

    sizes = Sizes(**job.sizes)
    BenchLayer(Sizes(**job.sizes | {"hidden": 16, "ffn_hidden": 16}), rank, None).run()
    found = Found(seconds={}, peak_bytes={}, plans={})
    for name, llep in job.variants.items():
        before = get_resident_bytes()
        layer = BenchLayer(sizes, rank, llep)
        for workload in job.workloads:
            layer.route(_choose(rank, job, workload))
            layer.run()
            reset_peak_resident_bytes()
            dist.barrier()
            layer.run()
            found.peak_bytes[workload, name] = get_peak_resident_bytes() - before
        del layer
        gc.collect()  # its router and itself refer to each other
    if rank == 0:
        print("memory: done", flush=True)
    return found


def choose_as_if_lent(rank: int, job: Job, workload: str) -> torch.Tensor:
    """Experts [T, 1] of this rank's tokens under `LIMIT`."""
    experts = _choose(rank, job, workload)
    num_ranks, num_experts = job.sizes["num_ranks"], job.sizes["num_experts"]
    counts = make_counts(
        workload,
        num_ranks=num_ranks,
        num_experts=num_experts,
        tokens_per_rank=job.sizes["tokens_per_rank"],
        top_k=1,
        seed=job.seed,
    )
    plan = make_plan(counts, planner="exact")
    rerouted = experts.clone()
    for expert, per_rank in enumerate(sends(plan, counts, rank)):
        M = plan.experts_per_rank
        at_home = np.arange(num_ranks) * M + expert % M  # the expert itself on its own rank
        rerouted[experts == expert] = torch.from_numpy(np.repeat(at_home, per_rank))
    return rerouted


def _choose(rank: int, job: Job, workload: str) -> torch.Tensor:
    """Experts [T, 1] of this rank's tokens."""
    experts = route_tokens(
        workload,
        num_ranks=job.sizes["num_ranks"],
        num_experts=job.sizes["num_experts"],
        tokens_per_rank=job.sizes["tokens_per_rank"],
        top_k=1,
        rank=rank,
        seed=job.seed,
    )
    return torch.from_numpy(experts)
