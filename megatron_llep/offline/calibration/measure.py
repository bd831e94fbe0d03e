"""Timings for a cost model, taken in several processes that work at the same time.

Shape letters: n tokens, h hidden size, f inner size of an expert.

On CPUs two processes, each with one thread on a core of its own, talk over gloo; where GPUs are,
one or two, over NCCL. Where more ranks share a machine's cores, as many are to be measured. Every
figure is of the slowest rank: the median of repeats, of exchanges the lower quartile.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llep.offline.calibration.clock import Clock
from megatron_llep.offline.calibration.exchanges import (
    find_overlap,
    list_regular,
    list_uneven,
    time_exchanges,
)
from megatron_llep.offline.calibration.fit import ExpertTiming, TransferTiming
from megatron_llep.offline.ranks import run_ranks

CACHE_BYTES = 2**28
"""More than what a core or a GPU finds in its caches."""
_MOST_EXPERTS = 64


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
    """The given sizes, for one expert (h, f) if there is one; small and few if `quick`."""
    experts = (expert,) if expert else sizes.experts
    if not quick:
        return replace(sizes, experts=experts)
    return replace(
        sizes,
        experts=experts[:1],
        tokens=sizes.tokens[:6],
        transfer_bytes=sizes.transfer_bytes[:6],
        repeats=3,
        transfer_repeats=5,
    )


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What the slowest rank took."""

    experts: list[ExpertTiming]
    copy_bytes_per_second: float
    transfers: list[TransferTiming]
    """To fit a link to: of each kind by growing bytes; empty with one rank."""
    uneven: list[TransferTiming]
    """To check it on; empty with one rank."""
    overlap: float
    """See CostModel; 0 with one rank."""


def measure(
    sizes: Sizes, report: Callable[[str], None], *, ranks: int | None = None
) -> Measurements:
    """Start the processes, measure, and end them.

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
    return run_ranks(_measure_rank, world, world, sizes)[0]


def _measure_rank(rank: int, store: Path, world: int, sizes: Sizes) -> Measurements:
    device = _take_device(rank)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
    )
    clock = Clock(device, sizes.repeats)
    regular = list_regular(world, sizes.transfer_bytes)
    uneven = list_uneven(world, sizes.transfer_bytes)
    exchanges = time_exchanges(clock, [*regular, *uneven], sizes.transfer_repeats)
    found = Measurements(
        experts=[
            _time_expert(clock, n, experts)
            for experts in (
                _make_experts(clock.device, h, f, sizes.dtype) for h, f in sizes.experts
            )
            for n in sizes.tokens
        ],
        copy_bytes_per_second=_time_copy(clock, sizes),
        transfers=exchanges[: len(regular)],
        uneven=exchanges[len(regular) :],
        overlap=find_overlap(clock, sizes.transfer_bytes[-1]) if world > 1 else 0.0,
    )
    dist.destroy_process_group()
    return found


def _take_device(rank: int) -> torch.device:
    """One GPU, or one core, for this rank alone."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    if os.uname().sysname == "Linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class _Expert:
    """A gated MLP whose weights have gradients, to which each backward adds."""

    fc1: torch.nn.Linear
    fc2: torch.nn.Linear

    @classmethod
    def make(cls, device: torch.device, h: int, f: int, dtype: torch.dtype) -> "_Expert":
        fc1 = torch.nn.Linear(h, 2 * f, bias=False, device=device, dtype=dtype)
        fc2 = torch.nn.Linear(f, h, bias=False, device=device, dtype=dtype)
        for each in (fc1, fc2):
            each.weight.grad = torch.zeros_like(each.weight)
        return cls(fc1=fc1, fc2=fc2)

    @property
    def num_bytes(self) -> int:
        """Of weights and gradients."""
        return 2 * (self.fc1.weight.nbytes + self.fc2.weight.nbytes)


def _make_experts(device: torch.device, h: int, f: int, dtype: torch.dtype) -> list[_Expert]:
    """As many as no cache holds, as in a layer: each finds its weights in memory."""
    first = _Expert.make(device, h, f, dtype)
    others = min(max(CACHE_BYTES // first.num_bytes, 1), _MOST_EXPERTS)
    return [first, *(_Expert.make(device, h, f, dtype) for _ in range(others))]


def _time_expert(clock: Clock, n: int, experts: list[_Expert]) -> ExpertTiming:
    """One after another of like experts, as one computes n tokens, with its weights' gradients."""
    first = experts[0].fc2.weight
    h, f = first.shape
    hidden = torch.randn(n, h, device=clock.device, dtype=first.dtype, requires_grad=True)
    probs = torch.rand(n, 1, device=clock.device, dtype=first.dtype)
    grad = torch.randn_like(hidden)
    turn = itertools.cycle(experts)
    outputs = []

    def forward() -> None:
        expert = next(turn)
        gate, up = expert.fc1(hidden).chunk(2, dim=-1)
        outputs.append(expert.fc2(torch.nn.functional.silu(gate) * up * probs))

    def backward() -> None:
        outputs.pop().backward(grad)

    forward_seconds, backward_seconds = clock.time(forward, backward)
    return ExpertTiming(
        tokens=n,
        flops_per_token=6 * h * f,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
    )


def _time_copy(clock: Clock, sizes: Sizes) -> float:
    """Bytes a second of bringing tokens into order, there and back."""
    h, n = sizes.experts[-1][0], sizes.tokens[-1]
    tokens = torch.randn(n, h, device=clock.device, dtype=sizes.dtype)
    order = torch.randperm(n, device=clock.device)
    result = torch.zeros_like(tokens)
    gather, scatter = clock.time(
        lambda: tokens.index_select(0, order), lambda: result.index_add_(0, order, tokens)
    )
    return 2 * tokens.nbytes / (gather + scatter)
