"""The processes of the correctness section: each is one expert-parallel rank.

Where there are fewer GPUs than ranks, several share one, over gloo: torch's gloo takes CUDA tensors
in all-to-all, all-gather, all-reduce and broadcast, and carries them through pinned host memory
by itself. Nothing else is called (`lending_run` sees to that): neither send and receive nor
coalesced collectives take them. Whether these do on this machine is checked first.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from gpu_checks.comparison import Comparison, compare
from megatron_llep.config import LLEPConfig
from megatron_llep.device import use_cpu_if_no_gpu

LIMIT_SECONDS = 400
"""For one world."""
LENDS_WHEREVER_IT_CAN = LLEPConfig(imbalance_threshold=1.0, min_tokens_per_gemm=1)

Planner = Literal["tolerant", "exact", "lla"]


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """What all ranks of one world do."""

    ep: int
    backend: Literal["nccl", "gloo"]
    quick: bool
    workloads: tuple[str, ...]
    planners: tuple[Planner, ...]
    transformer_engine: bool


def be_a_rank(rank: int, store: Path, job: RankJob) -> list[Comparison]:
    """Join the others, try the collectives, and compare; the same comparisons on every rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ep)}
    # Both sides of the comparison run the same kernels; compiling them would take longer.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # What Megatron says at import of packages that are not needed here.
    warnings.simplefilter("ignore")
    if job.backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device(use_cpu_if_no_gpu())
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        job.backend,
        store=dist.FileStore(str(store), job.ep),
        rank=rank,
        world_size=job.ep,
        timeout=timedelta(seconds=LIMIT_SECONDS),
    )
    check_collectives(device)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=job.ep, create_gloo_process_groups=False
    )
    found = list(compare_all(job, device))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def compare_all(job: RankJob, device: torch.device) -> Iterator[Comparison]:
    """Every workload, dtype and planner of the job; all ranks run the same."""
    from gpu_checks.lending_run import Kind, ModelSize, run_model

    # fp32 and bf16 on Megatron's local layers; bf16 in grouped GEMMs, of torch's and TE's.
    kinds = [Kind(dtype=torch.float32), Kind(dtype=torch.bfloat16)]
    if hasattr(torch.nn.functional, "grouped_mm"):
        kinds.append(Kind(dtype=torch.bfloat16, grouped_mm=True))
    if job.transformer_engine:
        kinds.append(Kind(dtype=torch.bfloat16, transformer_engine=True))
    size = ModelSize()
    if job.quick:
        size = ModelSize(hidden=32, ffn_hidden=64, num_experts=8, sequence_length=16, layers=1)
    for workload in job.workloads:
        for kind in kinds:
            plain = run_model(size, kind, workload, None, device)
            exact = None
            if kind.dtype != torch.float32:
                in_fp32 = replace(kind, dtype=torch.float32)
                exact = run_model(size, in_fp32, workload, None, device)
            lends = LENDS_WHEREVER_IT_CAN
            if kind.grouped_mm:
                lends = replace(lends, expert_gemm="grouped_mm")
            for planner in job.planners:
                llep = replace(lends, planner=planner)
                lending = run_model(size, kind, workload, llep, device)
                yield compare(f"{kind}, {workload}, {planner}", lending, plain, exact)


def check_collectives(device: torch.device) -> None:
    """Run every collective that the comparison needs, on tensors of the device.

    Raises:
        RuntimeError: one of them gave wrong values; names it.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        # Rank r sends r copies of its number to rank 1, and one to each other.
        sends = [rank if to == 1 else 1 for to in range(world)]
        receives = [source if rank == 1 else 1 for source in range(world)]
        arrive = [source for source, n in enumerate(receives) for _ in range(n)]
        incoming = torch.empty(sum(receives), dtype=dtype, device=device)
        outgoing = torch.full((sum(sends),), rank, dtype=dtype, device=device)
        work = dist.all_to_all_single(incoming, outgoing, receives, sends, async_op=True)
        _wait_and_check("all_to_all_single", work, incoming, arrive)

        gathered = torch.empty(world, dtype=dtype, device=device)
        mine = torch.full((1,), rank, dtype=dtype, device=device)
        work = dist.all_gather_into_tensor(gathered, mine, async_op=True)
        _wait_and_check("all_gather_into_tensor", work, gathered, list(range(world)))

        work = dist.all_reduce(mine, async_op=True)
        _wait_and_check("all_reduce", work, mine, [sum(range(world))])

        work = dist.broadcast(mine.fill_(rank + 5), src=0, async_op=True)
        _wait_and_check("broadcast", work, mine, [5])
    # As the ranks do when LLEP is switched on; where the tensors are is torch's choice.
    everyone: list = [None] * world
    dist.all_gather_object(everyone, rank)
    if everyone != list(range(world)):
        raise RuntimeError(f"{dist.get_backend()}'s all_gather_object gave {everyone}")


def _wait_and_check(
    name: str, work: dist.Work | None, found: torch.Tensor, expected: list[int]
) -> None:
    assert work is not None
    work.wait()
    if found.tolist() != expected:
        raise RuntimeError(
            f"{dist.get_backend()}'s {name} gave {found.tolist()} for {found.dtype} on "
            f"{found.device}, not {expected}"
        )
