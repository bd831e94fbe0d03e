"""Timing what several ranks do at once."""

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

LIMIT_SECONDS = 60.0
"""Of steps in turns, where these take so long that fewer rounds must do."""
LEAST_ROUNDS = 5
"""Then, too."""


class Clock:
    """Times work that all ranks do at once."""

    def __init__(self, device: torch.device, repeats: int):
        self.device = device
        self.repeats = repeats

    def time(self, *steps: Callable[[], object]) -> list[float]:
        """Median seconds of each step, run one after another, on the slowest rank."""
        seconds: list[list[float]] = [[] for _ in steps]
        for repeat in range(1 + self.repeats):
            dist.barrier()
            for taken, step in zip(seconds, steps, strict=True):
                self._wait()
                start = time.perf_counter()
                step()
                self._wait()
                if repeat:  # the first one warms up
                    taken.append(time.perf_counter() - start)
        return self._find_worst([statistics.median(taken) for taken in seconds])

    def time_in_turns(self, steps: Sequence[Callable[[], object]], rounds: int) -> list[float]:
        """Lower quartile of each of steps that do not belong together, on the slowest rank.

        All ranks begin each at once, in an order that differs from round to round: a step is slower
        behind one that leaves little in the caches. Steps are short and wait for other ranks, so
        whatever else runs disturbs many of them, and always makes them longer: hence the quartile.
        Over a slow link there are as many rounds as go into LIMIT_SECONDS, LEAST_ROUNDS at least.
        """
        start = time.perf_counter()
        self._run_round(steps, 0)  # warms up
        (a_round,) = self._find_worst([time.perf_counter() - start])
        rounds = min(rounds, max(int(LIMIT_SECONDS / a_round), LEAST_ROUNDS))
        found = [self._run_round(steps, turn) for turn in range(1, 1 + rounds)]
        taken = zip(*found, strict=True)
        return self._find_worst([sorted(of_step)[rounds // 4] for of_step in taken])

    def _run_round(self, steps: Sequence[Callable[[], object]], turn: int) -> list[float]:
        """Seconds of each step, run once, in this turn's order."""
        seconds = [0.0] * len(steps)
        order = list(range(len(steps)))
        random.Random(turn).shuffle(order)
        for number in order:
            dist.barrier()
            self._wait()
            start = time.perf_counter()
            steps[number]()
            self._wait()
            seconds[number] = time.perf_counter() - start
        return seconds

    def _find_worst(self, seconds: list[float]) -> list[float]:
        worst = torch.tensor(seconds, device=self.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.tolist()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
