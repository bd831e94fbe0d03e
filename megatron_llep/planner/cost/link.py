"""What carries bytes from one rank to others.

A transfer of b bytes one way takes latency + b / rate. Two things may differ from that:

- Buffers take in the first bytes of a transfer, or a cache holds them, and they go faster: the
  first `burst_bytes` of each take `burst_cost` of that time a byte.
- A processor that sends and receives does one after the other: what goes the other way in the same
  exchange takes `opposite_cost` of its own time besides, 0 where both ways have a wire each.

Shape letters: P ranks, L links: inside the node and, where there are several nodes, across nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llep.planner.cost.picoseconds import all_to_picoseconds, to_picoseconds


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank has to others, each way."""

    latency_seconds: float
    """Before the first byte of a transfer."""
    bytes_per_second: float
    """In one direction; behind the burst, if there is one."""
    burst_bytes: float = 0.0
    """The first bytes of a transfer, which do not take as long as others."""
    burst_cost: float = 1.0
    """0 .. 1: time of one of them / time of one behind them."""
    opposite_cost: float = 0.0
    """0 .. 1: of the time of the direction with less, what it adds to that of the one with more."""

    def time_bytes(self, things: np.ndarray, size: float) -> np.ndarray:
        """Whole picoseconds of so many things of `size` bytes, one way and without latency."""
        seconds = things * (size / self.bytes_per_second)
        burst = np.minimum(seconds, self.burst_bytes / self.bytes_per_second)
        return all_to_picoseconds(seconds - burst * (1 - self.burst_cost))

    def join_ways(self, times: np.ndarray) -> np.ndarray:
        """Whole picoseconds [...] of exchanges, from those of the two directions [2, ...]."""
        less = np.rint(times.min(axis=0) * self.opposite_cost).astype(np.int64)
        return times.max(axis=0) + less


def time_links(links: Sequence[Link], things: np.ndarray, size: float) -> np.ndarray:
    """[L, 2, P] picoseconds that each link is busy, each way, with so many things of `size` bytes.

    Args:
        links: L of them, or more.
        things: [L, 2, P] that each rank sends, and receives.
        size: of one.
    """
    times = [link.time_bytes(n, size) for link, n in zip(links, things, strict=False)]
    return np.stack(times)


def join_ways(links: Sequence[Link], times: np.ndarray) -> np.ndarray:
    """[P] picoseconds of exchanges whose ways take `times` [L, 2, P]; links work side by side."""
    joined = [link.join_ways(ways) for link, ways in zip(links, times, strict=False)]
    return np.max(joined, axis=0)


def time_starts(links: Sequence[Link], things: np.ndarray) -> int:
    """Latency of things [L, 2, P], which a rank starts one after another; the most."""
    most = things.reshape(len(things), -1).max(axis=1).tolist()
    return max(
        to_picoseconds(n * link.latency_seconds) for link, n in zip(links, most, strict=False)
    )
