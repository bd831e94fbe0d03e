"""One entry point for all planners: check the arguments, plan, fall back to plain EP.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import math

import numpy as np

from megatron_llep.planner.exact import exact_quota
from megatron_llep.planner.lla import lla_quota
from megatron_llep.planner.plan import Plan, imbalance_of, native_quota, plan_from_quota

PLANNERS = ("exact", "lla")


def make_plan(
    counts: np.ndarray,
    *,
    planner: str = "exact",
    max_foreign: int | None = None,
    capacity_factor: float = 1.0,
    min_tokens_per_gemm: int = 1024,
    imbalance_threshold: float = 1.3,
) -> Plan:
    """Plan one layer of one micro-batch. Every rank gets the same plan from the same counts.

    The plan is a fall-back to plain expert parallelism (nothing lent, `is_fallback`) when the
    imbalance is below `imbalance_threshold`, and when the planner does not lower the largest
    load. (Imbalance is taken over ranks, as in the LLEP reference code.)

    Args:
        counts: integers [P, E], tokens that each rank routes to each expert. Experts g*M ..
            (g+1)*M - 1 are native to rank g.
        planner: one of `PLANNERS`.
        max_foreign: most foreign experts per rank, 0 .. M; None means M.
        capacity_factor: the paper's alpha; `lla` only.
        min_tokens_per_gemm: the paper's m; `lla` only (`exact` leaves no surplus at home).
        imbalance_threshold: the paper's lambda; infinity never lends.

    Raises:
        ValueError: an argument is out of range; the message says which and what is allowed.
    """
    counts = np.asarray(counts)
    check_counts(counts)
    P, E = counts.shape
    if max_foreign is None:
        max_foreign = E // P
    check_options(
        planner=planner,
        max_foreign=max_foreign,
        experts_per_rank=E // P,
        capacity_factor=capacity_factor,
        min_tokens_per_gemm=min_tokens_per_gemm,
        imbalance_threshold=imbalance_threshold,
    )
    loads = counts.sum(axis=0, dtype=np.int64)
    if imbalance_of(loads.reshape(P, -1).sum(axis=1)) >= imbalance_threshold:
        if planner == "exact":
            quota = exact_quota(loads, P, max_foreign)
        else:
            quota = lla_quota(
                loads,
                P,
                max_foreign,
                capacity_factor=capacity_factor,
                min_tokens_per_gemm=min_tokens_per_gemm,
            )
        plan = plan_from_quota(quota)
        if plan.imbalance_after < plan.imbalance_before:
            return plan
    return plan_from_quota(native_quota(loads, P))


def check_counts(counts: np.ndarray) -> None:
    """Raise ValueError unless counts are non-negative integers [P, E] with P dividing E."""
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"counts must be a non-empty [P, E] array, not {list(counts.shape)}")
    if not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"counts must be integers, not {counts.dtype}: convert them to int64")
    P, E = counts.shape
    if E % P:
        raise ValueError(f"{E} experts do not divide over {P} ranks: use a multiple of {P}")
    if counts.min() < 0:
        raise ValueError(f"counts must not be negative, the smallest is {counts.min()}")


def check_options(
    *,
    planner: str,
    max_foreign: int,
    experts_per_rank: int,
    capacity_factor: float,
    min_tokens_per_gemm: int,
    imbalance_threshold: float,
) -> None:
    """Raise ValueError for an option of `make_plan` that is out of range."""
    if planner not in PLANNERS:
        raise ValueError(f"planner={planner!r} is unknown: choose one of {', '.join(PLANNERS)}")
    if not 0 <= max_foreign <= experts_per_rank:
        raise ValueError(
            f"max_foreign={max_foreign} must lie in 0 .. {experts_per_rank}, the experts per rank"
        )
    if not 1 <= capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor={capacity_factor} must be finite and at least 1: "
            "below 1 the ranks cannot hold all tokens"
        )
    if not min_tokens_per_gemm >= 0:
        raise ValueError(f"min_tokens_per_gemm={min_tokens_per_gemm} must be at least 0")
    if not imbalance_threshold >= 0:
        raise ValueError(
            f"imbalance_threshold={imbalance_threshold} must be at least 0; 0 always plans"
        )
