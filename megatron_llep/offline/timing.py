"""How things are timed: repeatedly and, where they are compared, in alternation."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Of a call, which is made so many times."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def take_turns[T](
    things: Sequence[T], rounds: int, *, warm_up: int = 1
) -> Iterator[tuple[T, bool]]:
    """Every thing in every round, beginning with another one each time.

    So what disturbs the machine for a while disturbs all.

    Yields:
        The thing whose turn it is, and whether it counts: first rounds only warm up.
    """
    for turn in range(warm_up + rounds):
        shift = turn % len(things)
        for thing in [*things[shift:], *things[:shift]]:
            yield thing, turn >= warm_up
