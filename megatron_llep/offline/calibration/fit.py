"""From timings to the numbers of a cost model.

Every law is linear in its unknowns and none of them may be negative. Errors are relative, so that
small sizes count as much as large ones.

Shape letters: P ranks, n timings.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.picoseconds import PER_SECOND

_OPPOSITE_COSTS = tuple((np.arange(21) / 20).tolist())


@dataclass(frozen=True, kw_only=True)
class ExpertTiming:
    """One expert's MLP on so many tokens."""

    tokens: int
    flops_per_token: int
    """Forward."""
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferTiming:
    """One all-to-all."""

    sent: np.ndarray
    """[P, P] bytes from each rank to each."""
    seconds: float

    @property
    def ways(self) -> np.ndarray:
        """[2, P] bytes that each rank sends, and receives, without what stays."""
        moved = self.sent * ~np.eye(len(self.sent), dtype=bool)
        return np.stack([moved.sum(axis=1), moved.sum(axis=0)])

    @property
    def busiest(self) -> tuple[int, int]:
        """Bytes of the busiest rank: the way with more, the way with less."""
        ranks = zip(self.ways.max(axis=0).tolist(), self.ways.min(axis=0).tolist(), strict=True)
        return max(ranks)


@dataclass(frozen=True, kw_only=True)
class LinkTimings:
    """Exchanges over one kind of link."""

    regular: Sequence[TransferTiming]
    """Of each kind, by growing bytes: every other one to fit to, the rest to check."""
    uneven: Sequence[TransferTiming] = ()
    """To check alone."""


@dataclass(frozen=True, kw_only=True)
class ExpertFit:
    """The numbers of a cost model that say how long an expert takes."""

    flops_per_second: float
    half_rate_tokens: float
    gemm_overhead_seconds: float
    backward_factor: float

    def predict(self, timing: ExpertTiming) -> float:
        """Seconds of forward and backward."""
        flops = timing.flops_per_token * (timing.tokens + self.half_rate_tokens)
        forward = flops / self.flops_per_second + self.gemm_overhead_seconds
        return forward * (1 + self.backward_factor)


def fit_expert(timings: Sequence[ExpertTiming]) -> ExpertFit:
    """Fit seconds = F * (n + h) / R + overhead, the law of the cost model.

    Raises:
        ValueError: fewer than three timings.
    """
    if len(timings) < 3:
        raise ValueError(f"{len(timings)} timings of experts: at least 3 are needed")
    backward_factor = float(np.median([t.backward_seconds / t.forward_seconds for t in timings]))
    flops = np.array([t.flops_per_token for t in timings], dtype=float)
    tokens = np.array([t.tokens for t in timings])
    both = np.array([t.forward_seconds + t.backward_seconds for t in timings])
    columns = np.stack([flops * tokens, flops, np.ones_like(flops)], axis=1)
    per_flop, per_weight, overhead = fit_not_negative(columns, both / (1 + backward_factor))
    return ExpertFit(
        flops_per_second=1 / per_flop,
        half_rate_tokens=per_weight / per_flop,
        gemm_overhead_seconds=overhead,
        backward_factor=backward_factor,
    )


def fit_link(timings: Sequence[TransferTiming]) -> Link:
    """Fit a link: latency, rate, burst up to one of the timed sizes, cost of the other way.

    The law is linear in the others once the burst's size and the other way's cost are chosen: all
    are tried.

    Raises:
        ValueError: fewer than two timings, or time does not grow with the bytes.
    """
    if len(timings) < 2:
        raise ValueError(f"{len(timings)} timings of transfers: at least 2 are needed")
    seconds = np.array([t.seconds for t in timings])
    ways = np.array([t.busiest for t in timings], dtype=float)  # [n, 2]
    sizes = np.unique(ways[:, 0]).tolist()
    # On either side of where the rate changes there must be sizes enough to tell it.
    bursts = [0.0, *sizes[2:-2]]
    # Without exchanges that differ in it, nothing tells what the other way costs.
    costs = _OPPOSITE_COSTS if len(np.unique(ways[:, 1] / ways[:, 0])) > 1 else (0.0,)
    found: list[tuple[float, int, Link]] = []
    for burst, cost in itertools.product(bursts, costs):
        try:
            link = _fit_rates(ways, seconds, burst, cost)
        except ValueError:  # behind this burst time does not grow
            if not burst:
                raise
            continue
        if link.burst_cost > 1:  # noise: first bytes that take longer are latency
            continue
        predicted = [predict_transfer(link, t) for t in timings]
        found.append((float(np.square(predicted / seconds - 1).sum()), len(found), link))
    return min(found)[-1]


def _fit_rates(
    ways: np.ndarray, seconds: np.ndarray, burst_bytes: float, opposite_cost: float
) -> Link:
    """Fit a link of which these two numbers are known."""
    costs = np.array([1.0, opposite_cost])
    columns = [np.maximum(ways - burst_bytes, 0.0) @ costs, np.ones_like(seconds)]
    if burst_bytes:
        columns.append(np.minimum(ways, burst_bytes) @ costs)
    per_byte, latency, *per_burst = fit_not_negative(np.stack(columns, axis=1), seconds)
    return Link(
        latency_seconds=latency,
        bytes_per_second=1 / per_byte,
        burst_bytes=burst_bytes,
        burst_cost=per_burst[0] / per_byte if per_burst else 1.0,
        opposite_cost=opposite_cost,
    )


def predict_transfer(link: Link, timing: TransferTiming) -> float:
    """Seconds of one exchange, as a layer's tokens are predicted."""
    times = link.join_ways(link.time_bytes(timing.ways, 1))
    return link.latency_seconds + int(times.max()) / PER_SECOND


def fit_not_negative(columns: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Least relative squares of columns @ x = seconds with x >= 0 and x[0] > 0.

    With so few unknowns the best set of those that are not zero is found by trying all.

    Args:
        columns: [n, unknowns].
        seconds: [n], positive.

    Raises:
        ValueError: nothing fits: time does not grow with the first column.
    """
    relative = columns / seconds[:, None]
    found: list[tuple[float, list[float]]] = []
    others = range(1, columns.shape[1])
    for size in range(columns.shape[1]):
        for extra in itertools.combinations(others, size):
            chosen = [0, *extra]
            x = np.zeros(columns.shape[1])
            scale = np.linalg.norm(relative[:, chosen], axis=0)
            x[chosen] = np.linalg.lstsq(relative[:, chosen] / scale, np.ones(len(seconds)))[0]
            x[chosen] /= scale
            if x[0] > 0 and (x >= 0).all():
                error = float(np.square(relative @ x - 1).sum())
                found.append((error, x.tolist()))
    if not found:
        raise ValueError("the timings do not grow with the work: measure on a quieter machine")
    return min(found)[1]


def find_errors(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Median and largest of |predicted / measured - 1|."""
    errors = np.abs(np.array(predicted) / np.array(measured) - 1)
    return float(np.median(errors)), float(errors.max())
