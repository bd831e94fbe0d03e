"""Replica scheduling: tokens spread over the replicas that expert data parallelism holds anyway.

Shape letters: D replicas of every expert, P ranks of one expert-parallel group, M = E / P native
experts a rank, tp sources a rank, R = D * P * tp sources, replica-major, then by rank.

Rank (d, p), number d * P + p, holds replica d of the experts of p. Each replica counts as an
expert of its own, number d * E + e: then D * P ranks with D * E experts, M native to each, are an
ordinary planning problem, and whatever replicas cannot even out is lent as usual.

The experts of p are on the same D ranks, so the linear program of `offline.lp` falls apart into
one problem for each p: the D ranks share the tokens of p. Tokens stay in the row d of their source
unless its rank is above the level that is aimed at.
"""

from typing import Any

import numpy as np

from megatron_llep.planner.compiled import compiled
from megatron_llep.planner.make import default_threshold, make_plan
from megatron_llep.planner.plan import Plan, imbalance_of, plan_from_quota


def plan_over_replicas(
    counts: np.ndarray,
    *,
    num_replicas: int,
    num_ranks: int,
    planner: str,
    imbalance_threshold: float | None = None,
    tolerance: float = 0.05,
    **options: Any,
) -> tuple[Plan, np.ndarray]:
    """Spread tokens over replicas, then plan what is left to lend.

    Args:
        counts: integers [R, E], tokens of each source to each expert.
        num_replicas: D; with 1 there is nothing to spread.
        num_ranks: D * P.
        planner: as `make_plan`; `lp` lends nothing.
        imbalance_threshold: as `make_plan`; below it tokens stay in their row.
        tolerance: as `make_plan`.
        options: the others of `make_plan`.

    Returns:
        The plan, for D * P ranks and D * E experts, and int64 [R, D * E], the tokens of each
        source to each replica, which it was made for.
    """
    if num_replicas > 1:
        if imbalance_threshold is None:
            imbalance_threshold = default_threshold(planner, tolerance)
        load = load_per_rank(counts, num_replicas, num_ranks)
        if imbalance_of(load.tolist()) < imbalance_threshold:
            counts = stay_in_row(counts, num_replicas)
        else:
            counts = spread_over_replicas(counts, num_replicas, num_ranks, lends=planner != "lp")
    by_rank = counts
    if len(counts) > num_ranks:
        by_rank = counts.reshape(num_ranks, -1, counts.shape[1]).sum(axis=1)
    plan = make_plan(
        by_rank,
        planner=planner,
        imbalance_threshold=imbalance_threshold,
        tolerance=tolerance,
        **options,
    )
    if num_replicas > 1:
        plan, counts = _drop_moves_of_replicas(plan, counts, num_replicas)
    return plan, counts


def load_per_rank(counts: np.ndarray, num_replicas: int, num_ranks: int) -> np.ndarray:
    """Tokens on each rank under plain expert parallelism: int64 [D * P] from counts [R, E]."""
    in_row = counts.reshape(num_replicas, -1, counts.shape[1]).sum(axis=1, dtype=np.int64)
    return in_row.reshape(num_ranks, -1).sum(axis=1)


def stay_in_row(counts: np.ndarray, num_replicas: int) -> np.ndarray:
    """Send all tokens to the replica in the row of their source: [R, D * E] from [R, E]."""
    counts = np.ascontiguousarray(counts, np.int64)
    return compiled("replicas.stay_in_row")(counts, num_replicas)


def spread_over_replicas(
    counts: np.ndarray, num_replicas: int, num_ranks: int, *, lends: bool
) -> np.ndarray:
    """Choose the replica of every token, with as few as possible out of the row of their source.

    Args:
        counts: integers [R, E], tokens of each source to each expert.
        num_replicas: D.
        num_ranks: D * P.
        lends: whether experts are lent afterwards. If not, the largest load of a rank becomes the
            least possible, and no token moves that need not for that. If so, ranks are filled up
            to the mean load, and what is above it is shared equally between the replicas.

    Returns:
        int64 [R, D * E], tokens of each source to each replica.
    """
    counts = np.ascontiguousarray(counts, np.int64)
    load = load_per_rank(counts, num_replicas, num_ranks)
    return compiled("replicas.spread_tokens")(counts, load, num_replicas, lends)


def _drop_moves_of_replicas(
    plan: Plan, spread: np.ndarray, num_replicas: int
) -> tuple[Plan, np.ndarray]:
    """Where a rank borrows an expert that it has a replica of, send it the tokens alone.

    Takes and returns a plan for D * P ranks and the spread [R, D * E] it is for.
    """
    P = plan.num_ranks // num_replicas
    _, home, borrower = plan.transfers.T
    if not (home % P == borrower % P).any():
        return plan, spread
    quota, spread = compiled("replicas.keep_own_replicas")(
        plan.quota, spread, plan.transfers, num_replicas
    )
    return plan_from_quota(quota), spread
