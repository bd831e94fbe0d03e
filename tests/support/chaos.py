"""Slow ranks, watched: every collective of this process is logged and may be delayed.

torch.distributed's functions all end in methods of ProcessGroup, so that is where we look: names
that Megatron bound at import are seen too.
"""

import contextlib
import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.routing import Routing

# Torch has renamed some: those of this version are watched.
_CALLS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "gather_single",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)

_MAX_POSITIONS = 64

Call = tuple[str, str, int]
"""Name of the call, what its group is for, and how many ranks are in it."""


@contextlib.contextmanager
def watch_collectives(before: Callable[[Call], None] | None = None) -> Iterator[list[Call]]:
    """Log every collective that this process starts, in order; `before` is called ahead of each.

    Not those in groups of one rank, which nobody waits for.
    """
    calls: list[Call] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in _CALLS:
            if hasattr(dist.ProcessGroup, name):
                _watch(monkeypatch, name, calls, before)
        yield calls


def _watch(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    calls: list[Call],
    before: Callable[[Call], None] | None,
) -> None:
    original = getattr(dist.ProcessGroup, name)

    def watched(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        if group.size() == 1:
            return original(group, *args, **kwargs)
        call = (name, group.group_desc, group.size())
        calls.append(call)
        if before is not None:
            before(call)
        return original(group, *args, **kwargs)

    monkeypatch.setattr(dist.ProcessGroup, name, watched)


def make_delays(
    seed: int, rank: int, *, share: float = 0.15, longest: float = 0.02
) -> Callable[[Call], None]:
    """Sleep up to `longest` seconds before a random `share` of calls, others on every rank."""
    draw = random.Random(f"{seed} {rank}")

    def sleep_at_times(call: Call) -> None:
        if draw.random() < share:
            time.sleep(draw.uniform(0, longest))

    return sleep_at_times


@dataclass(frozen=True)
class SkewedRouting(Routing):
    """Experts of every position drawn at random, their popularity as 1 / place ** skew."""

    skew: float = 1.0
    seed: int = 0

    def choose(self, positions: torch.Tensor, layer: int, E: int, K: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        popularity = torch.arange(1, E + 1, dtype=torch.float64) ** -self.skew
        popularity = popularity[torch.randperm(E, generator=generator)]
        drawn = torch.multinomial(popularity.expand(_MAX_POSITIONS, E), K, generator=generator)
        return drawn[positions]


@dataclass(frozen=True)
class Ending:
    """How one rank ended."""

    error: str
    """Its traceback with notes; empty if it ended well or was killed."""
    seconds: float
    """From the start of all ranks to this one's end."""


def end_ranks(
    function: Callable[[int], None], world_size: int, *, pg_timeout: float, limit: float = 60.0
) -> list[Ending]:
    """Run `function(rank)` on forked ranks, some of which fail, and see how each ends.

    Unlike `run_ranks`, the ranks that are left are not ended when one fails: they must end by
    themselves within `limit` seconds, with `pg_timeout` as the process groups' time-out.
    """
    with tempfile.TemporaryDirectory(prefix="endings-") as folder:
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=_end, args=(function, rank, world_size, pg_timeout, folder))
            for rank in range(world_size)
        ]
        start = time.monotonic()
        for each in ranks:
            each.start()
        endings = {}
        while len(endings) < world_size and time.monotonic() < start + limit:
            for rank, each in enumerate(ranks):
                if rank not in endings and not each.is_alive():
                    path = Path(folder, str(rank))
                    error = path.read_text() if path.exists() else ""
                    endings[rank] = Ending(error, time.monotonic() - start)
            time.sleep(0.02)
        late = set(range(world_size)) - set(endings)
        for rank in late:
            ranks[rank].kill()
        for each in ranks:
            each.join()
        assert not late, f"ranks {sorted(late)} hang; the others: {endings}"
        return [endings[rank] for rank in range(world_size)]


def _end(
    function: Callable[[int], None], rank: int, world_size: int, pg_timeout: float, folder: str
) -> None:
    with Path(folder, f"{rank}.output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder, "store")), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=pg_timeout),
    )
    try:
        function(rank)
    except Exception as error:
        Path(folder, str(rank)).write_text("".join(traceback.format_exception(error)))
    # Without Python's cleanup, in which other threads of a broken process group may hang.
    os._exit(0)
