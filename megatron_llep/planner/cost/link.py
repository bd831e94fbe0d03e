"""What carries bytes from one rank to others."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank has to others, each way."""

    latency_seconds: float
    """Before the first byte of a transfer."""
    bytes_per_second: float
    """In one direction, the other being in use too."""
