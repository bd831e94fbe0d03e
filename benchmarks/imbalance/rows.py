"""From what ranks found to rows: one for each mode, workload and method.

Letters: P ranks.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.imbalance.names import DISPATCH, FORCED, TRAIN
from benchmarks.imbalance.ranks import Found, Job, Key, Moved

_BYTES = 4
"""Of a number in fp32."""
EXCHANGES = {False: (2, 1), True: (4, 2)}
"""Whether there is a backward -> rows of hidden numbers, and single ones, of a pair on the wire."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method under one workload.

    Times are medians over rounds, each the mean of its steps, of the slowest rank; bytes are those
    that cross between ranks, the mean of the steps.
    """

    mode: str
    workload: str
    method: str
    seconds: float
    to_forced: float
    """This time / forced balance's: median over rounds of the ratio within a round."""
    slowest_step_seconds: float
    """Of the slowest step of each round, the median."""
    worst_pairs: int
    """Most (token, expert) pairs that a rank computed in a step."""
    imbalance: float
    """Largest over steps of the worst rank's pairs / the mean rank's."""
    token_bytes: int
    """Rows and weights of pairs, there and back; backward too, if there is one."""
    weight_bytes: int
    """Lent experts' weights and gradients, and the sums of replicas' gradients."""
    placed_bytes: int
    """What placing experts moved before the first step, once; not in the time."""
    peak_bytes: int
    """Of the worst rank."""
    peak_to_forced: float
    lent: float
    """Experts lent in a step, the mean."""
    off_by: float
    """Largest difference from the reference, relative."""

    @property
    def moved_bytes(self) -> int:
        """In a step."""
        return self.token_bytes + self.weight_bytes


def make_rows(job: Job, found: Sequence[Found]) -> list[Row]:
    """Put together what the ranks found."""
    rows = []
    for key in found[0].seconds:
        mode, workload, method = key
        forced = (mode, workload, FORCED)
        rounds, reference = _slowest_rank(found, key), _slowest_rank(found, forced)
        means = [statistics.mean(steps) for steps in rounds]
        peaks = [max(rank.peak_bytes[each] for rank in found) for each in (key, forced)]
        moved = found[0].moved[key]
        rows.append(
            Row(
                mode=mode,
                workload=workload,
                method=method,
                seconds=statistics.median(means),
                to_forced=statistics.median(
                    own / statistics.mean(steps)
                    for own, steps in zip(means, reference, strict=True)
                ),
                slowest_step_seconds=statistics.median(map(max, rounds)),
                worst_pairs=max(max(step.pairs) for step in moved),
                imbalance=max(max(step.pairs) / statistics.mean(step.pairs) for step in moved),
                **_count_bytes(job, mode, moved),
                placed_bytes=_count_placed(job, mode, found[0].placed[key]),
                peak_bytes=peaks[0],
                peak_to_forced=peaks[0] / peaks[1],
                lent=statistics.mean(step.lent for step in moved),
                off_by=max(rank.off_by[key] for rank in found),
            )
        )
    return rows


def _count_bytes(job: Job, mode: str, moved: Sequence[Moved]) -> dict[str, int]:
    rows, numbers = EXCHANGES[mode != DISPATCH]
    of_pair = (rows * job.sizes.hidden + numbers) * _BYTES
    return {
        "token_bytes": round(statistics.mean(step.crossing for step in moved) * of_pair),
        "weight_bytes": round(
            statistics.mean(step.weight_numbers + step.gradient_numbers for step in moved) * _BYTES
        ),
    }


def _count_placed(job: Job, mode: str, experts: int) -> int:
    """Weights, and in training the optimizer's momentum with them."""
    if mode == DISPATCH:
        return 0
    return experts * job.sizes.expert_numbers * _BYTES * (2 if mode == TRAIN else 1)


def _slowest_rank(found: Sequence[Found], key: Key) -> list[list[float]]:
    """Seconds of each step of each round, of the rank that took longest."""
    by_rank = (rank.seconds[key] for rank in found)
    return [
        [max(step) for step in zip(*rounds, strict=True)] for rounds in zip(*by_rank, strict=True)
    ]
