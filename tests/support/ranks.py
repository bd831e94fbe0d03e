"""Run a function on several ranks, each a process forked from this one.

The parent has imported torch and Megatron once, so a case costs the work it does and little more.
An error in a rank, or a hang, fails the test with what every rank was doing.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_POLL_SECONDS = 0.01
_STACK_WAIT_SECONDS = 1.0
_OUTPUT_TAIL = 3000


class RankError(AssertionError):
    """A rank raised, or died."""


class RankHangError(AssertionError):
    """The ranks did not end in time; the message holds a stack of each."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    in_group: bool = True,
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on ``world_size`` forked ranks over gloo.

    Each rank has one thread and, unless ``in_group`` is false, an initialised default process
    group. ``function`` may be a closure; what it returns must be picklable. What a rank prints is
    shown if the run fails.

    Returns:
        The results, in rank order.

    Raises:
        RankError: a rank raised (its traceback first) or was killed; the others are ended.
        RankHangError: not all ranks ended within ``timeout`` seconds.
    """
    _import_megatron()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        files = [_RankFiles(Path(folder), rank) for rank in range(world_size)]
        sys.stdout.flush()
        sys.stderr.flush()
        running: dict[int, int] = {}
        try:
            for rank in range(world_size):
                pid = os.fork()
                if pid == 0:
                    _be_a_rank(function, files[rank], world_size, args, timeout, in_group)
                running[pid] = rank
            _wait_for_ranks(running, files, time.monotonic() + timeout)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [pickle.loads(each.result.read_bytes()) for each in files]


class _RankFiles:
    """Where a rank leaves its result, traceback, stacks and output."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank = rank
        self.store = folder / "store"
        self.result = folder / f"{rank}.result"
        self.traceback = folder / f"{rank}.traceback"
        self.stacks = folder / f"{rank}.stacks"
        self.output = folder / f"{rank}.output"

    def read_output(self) -> str:
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return text[-_OUTPUT_TAIL:]


def _import_megatron() -> None:
    """Import once, in the parent, what every forked rank needs."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401

    torch.set_num_threads(1)


def _be_a_rank(
    function: Callable[..., Any],
    files: _RankFiles,
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    in_group: bool,
) -> None:
    """Run in the child and never return."""
    code = 1
    of_parent = {*multiprocessing.active_children()}
    try:
        with _redirect_output(files.output), files.stacks.open("w") as stacks:
            faulthandler.enable(file=sys.stderr)
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
            try:
                result = _call(function, files, world_size, args, timeout, in_group)
                files.result.write_bytes(pickle.dumps(result))
                code = 0
            except BaseException:
                _write_whole(files.traceback, traceback.format_exc())
    finally:
        try:
            # Of Megatron's, for what it saves: left alone they would outlive the tests.
            for child in {*multiprocessing.active_children()} - of_parent:
                child.kill()
        finally:
            os._exit(code)


def _call(
    function: Callable[..., Any],
    files: _RankFiles,
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    in_group: bool,
) -> Any:
    os.environ.update(RANK=str(files.rank), LOCAL_RANK=str(files.rank), WORLD_SIZE=str(world_size))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # What a save has written comes back through this. Megatron would start a process for it, which
    # imports torch again, and does so where a run is started as a user does.
    filesystem_async._results_queue = queue.Queue()
    if not in_group:
        return function(files.rank, world_size, *args)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(files.store), world_size),
        rank=files.rank,
        world_size=world_size,
        # Longer than the parent waits: a hang is to be seen as one, with stacks.
        timeout=timedelta(seconds=2 * timeout + 60),
    )
    result = function(files.rank, world_size, *args)
    dist.barrier()
    return result


@contextlib.contextmanager
def _redirect_output(path: Path) -> Iterator[None]:
    """Send stdout and stderr of this process, also those of C++, to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    yield
    sys.stdout.flush()
    sys.stderr.flush()


def _write_whole(path: Path, text: str) -> None:
    """Write so that a reader sees all or nothing."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def _wait_for_ranks(running: dict[int, int], files: list[_RankFiles], deadline: float) -> None:
    """Wait until all ranks ended well; take each that ended out of ``running``."""
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                rank = running.pop(pid)
                if status != 0:
                    raise RankError(_describe_error(rank, status, files))
        if time.monotonic() > deadline:
            raise RankHangError(_describe_hang(running, files))
        time.sleep(_POLL_SECONDS)


def _describe_error(rank: int, status: int, files: list[_RankFiles]) -> str:
    # Ranks that lost their peer fail too, a moment later; the first traceback is the cause.
    failed = [each for each in files if each.traceback.exists()]
    failed.sort(key=lambda each: each.traceback.stat().st_mtime_ns)
    parts = []
    if os.WIFSIGNALED(status):
        parts.append(f"rank {rank} was killed by {signal.Signals(os.WTERMSIG(status)).name}")
        parts.append(files[rank].read_output())
    for each in failed:
        parts.append(f"rank {each.rank} of {len(files)} raised:\n{each.traceback.read_text()}")
        output = each.read_output()
        if output:
            parts.append(f"rank {each.rank} had printed:\n{output}")
    return "\n\n".join(parts) or f"rank {rank} ended with status {status} and left no traceback"


def _describe_hang(running: dict[int, int], files: list[_RankFiles]) -> str:
    for pid in running:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(_STACK_WAIT_SECONDS)
    waiting = set(running.values())
    parts = [f"ranks {sorted(waiting)} of {len(files)} did not end in time"]
    for each in files:
        stacks = each.stacks.read_text() if each.rank in waiting else "ended\n"
        parts.append(f"rank {each.rank}:\n{stacks}{each.read_output()}")
    return "\n\n".join(parts)
