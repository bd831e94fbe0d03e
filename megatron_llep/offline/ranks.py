"""New processes on this machine, each a rank of one group, and what they find."""

import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch


def run_ranks[T](
    work: Callable[..., T], world: int, *args: Any, limit_seconds: float = float("inf")
) -> list[T]:
    """Call `work(rank, store, *args)` in so many processes; what they return, in rank order.

    Args:
        work: a function of a module; it makes the process group, with a FileStore on `store`.
        world: how many.
        args: and what `work` returns can be pickled.
        limit_seconds: after which they are killed.

    Raises:
        ProcessRaisedException: a rank failed; holds its traceback.
        TimeoutError: they did not end.
    """
    context = torch.multiprocessing.get_context("spawn")
    queues = [context.SimpleQueue() for _ in range(world)]
    found: dict[int, T] = {}
    until = time.monotonic() + limit_seconds
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.spawn(
            _be_a_rank, (work, queues, Path(folder) / "store", args), nprocs=world, join=False
        )
        ended = False
        while not ended:
            ended = processes.join(timeout=0.1, grace_period=5)
            # A rank cannot end before what it found was read.
            found |= {rank: queue.get() for rank, queue in enumerate(queues) if not queue.empty()}
            if not ended and time.monotonic() > until:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"{world} ranks took more than {limit_seconds:.0f} s")
    return [found[rank] for rank in range(world)]


def _be_a_rank(
    rank: int,
    work: Callable[..., Any],
    queues: "Sequence[SimpleQueue[Any]]",
    store: Path,
    args: tuple[Any, ...],
) -> None:
    queues[rank].put(work(rank, store, *args))
