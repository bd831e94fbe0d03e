"""Timings for a cost model, taken in several processes that work at the same time.

On CPUs each has one thread on a core of its own, and they talk over gloo; where GPUs are, over
NCCL. On one machine two are started; where more ranks share a machine's cores, as many are to be
measured. Over several nodes torchrun starts them. Every figure is of the slowest rank: the median
of repeats, of exchanges the lower quartile.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llep.offline.calibration.clock import Clock
from megatron_llep.offline.calibration.exchanges import find_overlap, time_link
from megatron_llep.offline.calibration.experts import make_experts, time_copy, time_expert
from megatron_llep.offline.calibration.fit import ExpertTiming, LinkTimings
from megatron_llep.offline.calibration.group import Member, join_new
from megatron_llep.offline.calibration.reach import reach_across, reach_inside
from megatron_llep.offline.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What to measure."""

    experts: tuple[tuple[int, int], ...]
    """(h, f) of each expert, gated."""
    tokens: tuple[int, ...]
    """n of each expert; every other one, from the second on, is kept for the check."""
    transfer_bytes: tuple[int, ...]
    """Likewise."""
    repeats: int = 7
    transfer_repeats: int = 31
    """Rounds through all sizes of transfers, which are more easily disturbed."""
    dtype: torch.dtype = torch.float32


CPU_SIZES = Sizes(
    experts=((256, 512), (512, 1024)),
    tokens=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    transfer_bytes=tuple(round(2 ** (k / 2)) for k in range(28, 49)),
)
GPU_SIZES = Sizes(
    experts=((2048, 1408), (4096, 2048)),
    tokens=(16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    transfer_bytes=tuple(round(2 ** (k / 2)) for k in range(32, 55)),
    repeats=20,
    dtype=torch.bfloat16,
)


def choose_sizes(sizes: Sizes, *, expert: tuple[int, int] | None, quick: bool) -> Sizes:
    """The given sizes, for one expert (h, f) if there is one; few of them if `quick`."""
    experts = (expert,) if expert else sizes.experts
    if not quick:
        return replace(sizes, experts=experts)
    return replace(
        sizes,
        experts=experts[:1],
        tokens=sizes.tokens[:6],
        transfer_bytes=sizes.transfer_bytes[::4],
        repeats=3,
        transfer_repeats=5,
    )


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What the slowest rank took."""

    experts: list[ExpertTiming]
    copy_bytes_per_second: float
    inside: LinkTimings | None
    """Between ranks of a node; None with one rank a node."""
    across: LinkTimings | None
    """Between nodes; None with one node."""
    overlap: float
    """See CostModel; inside the node where there is somebody, 0 with one rank."""


def measure(
    sizes: Sizes, report: Callable[[str], None], *, ranks: int | None = None
) -> Measurements:
    """Start processes on this machine, measure, and end them.

    Args:
        sizes: what to measure.
        report: told what is measured now.
        ranks: how many processes; default: two, one on one GPU.

    Raises:
        ProcessRaisedException: a process failed.
        ValueError: more ranks than GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    world = ranks or (2 if gpus is None else min(gpus, 2))
    if gpus is not None and world > gpus:
        raise ValueError(f"--ranks {world}: each needs a GPU, and here are {gpus}; give fewer")
    report(f"experts, copies and transfers in {world} processes")
    return run_ranks(_measure_new_rank, world, world, sizes)[0]


def _measure_new_rank(rank: int, store: Path, world: int, sizes: Sizes) -> Measurements:
    return measure_together(join_new(rank, store, world), sizes)


def measure_together(member: Member, sizes: Sizes) -> Measurements:
    """Measure, as one of a group whose members all do, and leave it."""
    clock = Clock(member.device, sizes.repeats)
    shape = member.nodes.num_ranks, member.nodes.ranks_per_node
    inside, across = reach_inside(*shape), reach_across(*shape)
    links = [
        time_link(clock, reach, sizes.transfer_bytes, sizes.transfer_repeats)
        for reach in (inside, across)
    ]
    talking = [reach for reach in (inside, across) if not reach.is_empty]
    found = Measurements(
        experts=[
            time_expert(clock, n, experts)
            for experts in (make_experts(clock.device, h, f, sizes.dtype) for h, f in sizes.experts)
            for n in sizes.tokens
        ],
        copy_bytes_per_second=time_copy(clock, sizes.tokens[-1], sizes.experts[-1][0], sizes.dtype),
        inside=links[0],
        across=links[1],
        overlap=find_overlap(clock, talking[0], sizes.transfer_bytes[-1]) if talking else 0.0,
    )
    dist.destroy_process_group()
    return found
