"""The processes of the correctness section: each is one expert-parallel rank.

Where there are fewer GPUs than ranks, several share one, over gloo: torch's gloo takes CUDA tensors
in all-to-all, all-gather, all-reduce and broadcast, and carries them through pinned host memory
by itself. Nothing else is called (`lending_run` sees to that): neither send and receive nor
coalesced collectives take them. Whether these do on this machine is checked first.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_llep.device import use_cpu_if_no_gpu

LIMIT_SECONDS = 400
"""For one world."""

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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """LLEP against plain Megatron on one rank."""

    what: str
    lent: int
    """Experts lent in all layers and micro-batches."""
    loss_difference: float
    """Largest relative difference of a loss from plain."""
    gradient_difference: float
    """Largest |LLEP - plain| of a parameter's gradient / largest |plain|, worst parameter."""
    worst_parameter: str
    control_ratio: float | None = None
    """bf16: distance of LLEP's gradient from plain's in fp32 / that of plain's in bf16 (norms),
    worst parameter."""


def run_ranks(job: RankJob) -> list[list[Comparison]]:
    """Start the processes and wait: comparisons of each rank.

    Raises:
        ProcessRaisedException: a rank failed; holds its traceback.
        TimeoutError: the ranks did not end.
    """
    context = torch.multiprocessing.get_context("spawn")
    queues = [context.SimpleQueue() for _ in range(job.ep)]
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.spawn(
            _be_a_rank, (job, Path(folder) / "store", queues), nprocs=job.ep, join=False
        )
        found: dict[int, list[Comparison]] = {}
        until = time.monotonic() + LIMIT_SECONDS
        ended = False
        while not ended:
            ended = processes.join(timeout=0.1, grace_period=5)
            found |= {rank: q.get() for rank, q in enumerate(queues) if not q.empty()}
            if not ended and time.monotonic() > until:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"EP={job.ep}: the ranks took more than {LIMIT_SECONDS} s")
    return [found[rank] for rank in range(job.ep)]


def _be_a_rank(
    rank: int, job: RankJob, store: Path, queues: Sequence["SimpleQueue[list[Comparison]]"]
) -> None:
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
    from gpu_checks.comparison import compare_all

    queues[rank].put(compare_all(job, device))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


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
        expected = torch.tensor(
            [source for source, n in enumerate(receives) for _ in range(n)], dtype=dtype
        )
        incoming = torch.empty(sum(receives), dtype=dtype, device=device)
        outgoing = torch.full((sum(sends),), rank, dtype=dtype, device=device)
        work = dist.all_to_all_single(incoming, outgoing, receives, sends, async_op=True)
        _wait_and_check("all_to_all_single", work, incoming, expected)

        gathered = torch.empty(world, dtype=dtype, device=device)
        mine = torch.full((1,), rank, dtype=dtype, device=device)
        work = dist.all_gather_into_tensor(gathered, mine, async_op=True)
        _wait_and_check("all_gather_into_tensor", work, gathered, torch.arange(world).to(dtype))

        work = dist.all_reduce(mine, async_op=True)
        total = torch.full((1,), world * (world - 1) // 2, dtype=dtype)
        _wait_and_check("all_reduce", work, mine, total)

        work = dist.broadcast(mine.fill_(rank + 5), src=0, async_op=True)
        _wait_and_check("broadcast", work, mine, torch.full((1,), 5, dtype=dtype))
    # As the ranks do when LLEP is switched on; where the tensors are is torch's choice.
    everyone: list = [None] * world
    dist.all_gather_object(everyone, rank)
    if everyone != list(range(world)):
        raise RuntimeError(f"{dist.get_backend()}'s all_gather_object gave {everyone}")


def _wait_and_check(
    name: str, work: dist.Work | None, found: torch.Tensor, expected: torch.Tensor
) -> None:
    assert work is not None
    work.wait()
    if not torch.equal(found.cpu(), expected):
        raise RuntimeError(
            f"{dist.get_backend()}'s {name} gave {found.tolist()} for {found.dtype} on "
            f"{found.device}, not {expected.tolist()}"
        )
