"""Forked ranks of one world size that run draws one after another, until one fails or hangs.

Parent and ranks speak JSON lines over pipes. A draw that takes longer than the limit is a hang: a
stack of each rank is taken, and the ranks are killed.
"""

import contextlib
import faulthandler
import gc
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from chaos_draws.compare import Disturb, RankReport, compare, count_lent, find_disagreements
from chaos_draws.draw import Draw, make_draw
from megatron_llep.planner import compile_planners
from support.layout import Layout, use_layout

Verdict = Literal["same", "differs", "failed", "hangs"]

_GRACE_SECONDS = 1.0
"""For other ranks to say what they saw, when one has failed."""
_STACK_SECONDS = 0.3
_FRAMES = 6
_FATAL = "Fatal Python error: "
_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
_PACKAGES = ("megatron_llep/", "megatron/", "chaos_draws/", "support/", "torch/")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a draw."""

    draw: Draw
    verdict: Verdict
    lent: int = 0
    """Experts lent in it, by all ranks."""
    details: tuple[str, ...] = ()
    """What is wrong; of a hang where each rank waits."""
    seconds: float


class Crew:
    """The ranks of one world size; started by the first draw, and again after a failure."""

    def __init__(self, world_size: int, *, limit: float, disturb: Disturb | None = None):
        """See the class.

        Args:
            world_size: ranks of every draw's layout.
            limit: seconds after which a draw is a hang.
            disturb: see `compare`.
        """
        self._world_size = world_size
        self._limit = limit
        self._disturb = disturb
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, draw: Draw) -> Outcome:
        """Run a draw on all ranks."""
        if not self._ranks:
            self._start()
        start = time.monotonic()
        for rank in self._ranks:
            rank.ask(draw)
        outcome = self._judge(draw, start)
        if outcome.verdict != "same":
            self._end()
        return outcome

    def _judge(self, draw: Draw, start: float) -> Outcome:
        answers, timed_out = self._listen(start + self._limit)
        taken = {"draw": draw, "seconds": time.monotonic() - start}
        errors = [answer["error"] for answer in answers if answer and "error" in answer]
        errors += [
            f"rank {rank.number} died: {rank.describe_end()}" for rank in self._ranks if rank.died
        ]
        if errors:
            return Outcome(verdict="failed", details=tuple(errors), **taken)
        if timed_out:
            return Outcome(verdict="hangs", details=tuple(self._see_where()), **taken)
        reports = [RankReport(**answer) for answer in answers if answer]
        details = find_disagreements(reports)
        for rank, report in enumerate(reports):
            details += [f"rank {rank}, {each}" for each in report.differs]
        return Outcome(
            verdict="differs" if details else "same",
            lent=count_lent(reports),
            details=tuple(details),
            **taken,
        )

    def _listen(self, until: float) -> tuple[list[dict[str, Any] | None], bool]:
        """Each rank's answer, None of those that gave none, and whether time ran out."""
        answers: list[dict[str, Any] | None] = [None] * self._world_size
        waiting = {rank.answers: rank for rank in self._ranks}
        while waiting:
            readable, _, _ = select.select(list(waiting), [], [], max(0, until - time.monotonic()))
            if not readable:
                return answers, True
            for descriptor in readable:
                rank = waiting[descriptor]
                answer = rank.read()
                if answer is None and not rank.died:
                    continue
                del waiting[descriptor]
                answers[rank.number] = answer
                if answer is None or "error" in answer:
                    until = min(until, time.monotonic() + _GRACE_SECONDS)
        return answers, False

    def _see_where(self) -> list[str]:
        """Where each rank is, innermost first."""
        for rank in self._ranks:
            os.kill(rank.pid, signal.SIGUSR1)
        time.sleep(_STACK_SECONDS)
        return [
            f"rank {rank.number} is in {describe_stack(rank.stacks.read_text())}"
            for rank in self._ranks
        ]

    def _start(self) -> None:
        compile_planners()
        torch.set_num_threads(1)
        self._folder = tempfile.TemporaryDirectory(prefix="chaos-")
        folder = Path(self._folder.name)
        sys.stdout.flush()
        sys.stderr.flush()
        for number in range(self._world_size):
            commands, answers = os.pipe(), os.pipe()
            pid = os.fork()
            if pid == 0:
                for rank in self._ranks:  # so that they end when the parent does
                    rank.close()
                os.close(commands[1])
                os.close(answers[0])
                _be_a_rank(number, self._world_size, folder, commands[0], answers[1], self._disturb)
            os.close(commands[0])
            os.close(answers[1])
            self._ranks.append(_Rank(number, pid, commands[1], answers[0], folder))

    def _end(self) -> None:
        for rank in self._ranks:
            rank.close()
            os.kill(rank.pid, signal.SIGKILL)
            os.waitpid(rank.pid, 0)
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class _Rank:
    """What the parent has of a rank."""

    def __init__(self, number: int, pid: int, commands: int, answers: int, folder: Path):
        self.number, self.pid = number, pid
        self.answers = answers
        self.died = False
        self.stacks = folder / f"{number}.stacks"
        self._output = folder / f"{number}.output"
        self._commands = commands
        self._pending = b""

    def ask(self, draw: Draw) -> None:
        with contextlib.suppress(BrokenPipeError):  # seen when its answer is read
            os.write(self._commands, json.dumps([draw.seed, draw.number]).encode() + b"\n")

    def read(self) -> dict[str, Any] | None:
        """Its answer, or None as long as it is not whole."""
        read = os.read(self.answers, 1 << 16)
        self.died = not read
        self._pending += read
        line, end, rest = self._pending.partition(b"\n")
        if not end:
            return None
        self._pending = rest
        answer: dict[str, Any] = json.loads(line)
        return answer

    def describe_end(self) -> str:
        """Its last words, and where it was if a fatal signal ended it."""
        text = self._output.read_text(errors="replace")
        said, found, fatal = text.partition(_FATAL)
        (last_words,) = said.strip().splitlines()[-1:] or ["it printed nothing"]
        if not found:
            return last_words
        error, _, stack = fatal.partition("\n\n")
        return f"{last_words}; {error} in {describe_stack(stack.partition('\n\n')[0])}"

    def close(self) -> None:
        os.close(self._commands)
        os.close(self.answers)


def describe_stack(text: str) -> str:
    """The innermost frames of the main thread, of what faulthandler wrote; paths within packages.

    The first one, and then those of this project and Megatron.
    """
    main = text.strip().split("\n\n")[-1]
    frames = []
    for match in _FRAME.finditer(main):
        path = _shorten(match["path"])
        if not frames or not path.startswith("torch/"):
            frames.append(f"{path}:{match['line']} {match['function']}")
    return " < ".join(frames[:_FRAMES]) or "no Python code"


def _shorten(path: str) -> str:
    for package in _PACKAGES:
        parts = path.rpartition("/" + package)
        if parts[1]:
            return package + parts[2]
    return path.rpartition("/")[2]


def _be_a_rank(
    rank: int,
    world_size: int,
    folder: Path,
    commands: int,
    answers: int,
    disturb: Disturb | None,
) -> NoReturn:
    """Run in the child and never return."""
    try:
        output = os.open(folder / f"{rank}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        faulthandler.enable(file=sys.stderr)
        with (folder / f"{rank}.stacks").open("w") as stacks:
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
            _answer(rank, world_size, folder, commands, answers, disturb)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _answer(
    rank: int,
    world_size: int,
    folder: Path,
    commands: int,
    answers: int,
    disturb: Disturb | None,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(hours=1),  # a hang is to be seen as one
    )
    gc.freeze()  # what the parent has imported need not be looked at after each draw
    in_use: Layout | None = None
    with os.fdopen(commands) as lines, contextlib.ExitStack() as stack:
        for line in lines:
            draw = make_draw(*json.loads(line))
            try:
                if draw.layout != in_use:
                    stack.close()
                    stack.enter_context(use_layout(draw.layout))
                    in_use = draw.layout
                answer = compare(draw, rank, disturb)
            except Exception:
                answer = {"error": f"rank {rank} raised:\n{traceback.format_exc()}"}
            gc.collect()
            _write(answers, json.dumps(answer).encode() + b"\n")


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
