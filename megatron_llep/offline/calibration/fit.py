"""From timings to the numbers of a cost model.

Every law is linear in its unknowns and none of them may be negative. Errors are relative, so that
small sizes count as much as large ones.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llep.planner.cost.link import Link


@dataclass(frozen=True, kw_only=True)
class ExpertTiming:
    """One expert's MLP on so many tokens."""

    tokens: int
    flops_per_token: int
    """Forward."""
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True, kw_only=True)
class TransferTiming:
    """One exchange in which a rank sends, and receives, so many bytes."""

    num_bytes: int
    seconds: float


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
    """Fit seconds = latency + bytes / rate.

    Raises:
        ValueError: fewer than two timings.
    """
    if len(timings) < 2:
        raise ValueError(f"{len(timings)} timings of transfers: at least 2 are needed")
    size = np.array([t.num_bytes for t in timings], dtype=float)
    columns = np.stack([size, np.ones_like(size)], axis=1)
    per_byte, latency = fit_not_negative(columns, np.array([t.seconds for t in timings]))
    return Link(latency_seconds=latency, bytes_per_second=1 / per_byte)


def predict_transfer(link: Link, num_bytes: int) -> float:
    """Seconds of one exchange."""
    return link.latency_seconds + num_bytes / link.bytes_per_second


def fit_not_negative(columns: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Least relative squares of columns @ x = seconds with x >= 0 and x[0] > 0.

    With so few unknowns the best set of those that are not zero is found by trying all.

    Args:
        columns: [timings, unknowns].
        seconds: [timings], positive.

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
