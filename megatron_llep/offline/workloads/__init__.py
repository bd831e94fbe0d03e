"""Routings to plan, simulate and measure with: made ones, and ones that Megatron traced.

`make_counts` gives a whole layer's counts, `rank_counts` one rank's row, and `route_tokens` an
expert choice for each token of a rank, for a real layer; the three agree. Numpy only.
"""

from megatron_llep.offline.workloads.catalogue import PAPER_GRID, WORKLOADS, Workload, make_hot
from megatron_llep.offline.workloads.counts import (
    get_workload,
    make_counts,
    rank_counts,
    route_tokens,
)
from megatron_llep.offline.workloads.trace import TracedLayer, read_trace

__all__ = [
    "PAPER_GRID",
    "WORKLOADS",
    "TracedLayer",
    "Workload",
    "get_workload",
    "make_counts",
    "make_hot",
    "rank_counts",
    "read_trace",
    "route_tokens",
]
