"""Routing counts that the planner tests share."""

from functools import partial

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_llep.planner.exact import exact_moves
from megatron_llep.planner.lla import lla_moves
from megatron_llep.planner.plan import plan_from_moves
from megatron_llep.planner.tolerant import tolerant_moves

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


def _quota(make_loans, loads, num_ranks: int, *args, **options) -> np.ndarray:
    """[E, P] quotas of a planner alone, without thresholds or fall-back."""
    rank_loads = loads.reshape(num_ranks, -1).sum(axis=1).tolist()
    return plan_from_moves(loads, rank_loads, make_loans(loads, rank_loads, *args, **options)).quota


exact_quota = partial(_quota, exact_moves)
lla_quota = partial(_quota, lla_moves)
tolerant_quota = partial(_quota, tolerant_moves)
