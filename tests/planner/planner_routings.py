"""Routing counts that the planner tests share."""

from functools import partial

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_llep.planner.make import plan_counts
from megatron_llep.planner.prices import USUAL_PRICES
from megatron_llep.planner.topology import ONE_NODE, Topology

# The same examples on every run, and no deadline on a shared machine.
REPRODUCIBLE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow],
)

# Those that need no cost model; `auto` chooses among their plans.
SIMPLE_PLANNERS = ("tolerant", "exact", "lla", "lp")

KINDS = (
    "uniform",
    "lognormal",
    "tiny",
    "zeros",
    "one_expert",
    "one_rank",
    "one_source",
    "mostly_idle",
)


def make_counts(kind: str, P: int, M: int, seed: int, tp: int = 1) -> np.ndarray:
    """[P * tp, P * M] counts of one kind of routing."""
    rng = np.random.default_rng(seed)
    R, E = P * tp, P * M
    if kind == "uniform":
        return rng.integers(0, 200, (R, E))
    if kind == "lognormal":
        weights = rng.lognormal(0, 2, E)
        return rng.multinomial(4096, weights / weights.sum(), size=R)
    if kind == "tiny":
        return rng.integers(0, 2, (R, E))
    counts = np.zeros((R, E), dtype=np.int64)
    if kind == "one_expert":
        counts[:, rng.integers(E)] = rng.integers(1, 5000, R)
    elif kind == "one_rank":
        home = rng.integers(P)
        counts[:, home * M : (home + 1) * M] = rng.integers(0, 500, (R, M))
    elif kind == "one_source":
        counts[rng.integers(R)] = rng.integers(0, 3000, E)
    elif kind == "mostly_idle":
        counts[:, :: max(1, M)] = rng.integers(0, 4, (R, -(-E // max(1, M))))
    return counts


@st.composite
def routings(draw, max_ranks: int = 64, max_experts: int = 512) -> tuple[np.ndarray, int]:
    """Counts [P, E] and a bound on foreign slots."""
    P = draw(st.sampled_from([p for p in (1, 2, 3, 4, 7, 8, 16, 33, 64) if p <= max_ranks]))
    M = draw(st.integers(1, min(24, max_experts // P)))
    counts = make_counts(draw(st.sampled_from(KINDS)), P, M, draw(st.integers(0, 10_000)))
    return counts, draw(st.sampled_from([M, M, 0, 1, M // 2]))


def _quota(
    planner: str,
    loads: np.ndarray,
    num_ranks: int,
    max_foreign: int,
    topology: Topology = ONE_NODE,
    *,
    capacity_factor: float = 1.0,
    min_tokens_per_gemm: int = 0,
    tolerance: float = 0.05,
) -> np.ndarray:
    """[E, P] quotas of a planner alone, without thresholds or fall-back."""
    counts = np.zeros((num_ranks, len(loads)), dtype=np.int64)
    counts[0] = loads
    return plan_counts(
        counts,
        planner=planner,
        max_foreign=max_foreign,
        capacity_factor=capacity_factor,
        min_tokens_per_gemm=min_tokens_per_gemm,
        threshold=0.0,
        tolerance=tolerance,
        prices=USUAL_PRICES,
        topology=topology,
        falls_back=False,
    ).quota


exact_quota = partial(_quota, "exact")
lla_quota = partial(_quota, "lla")
tolerant_quota = partial(_quota, "tolerant")
