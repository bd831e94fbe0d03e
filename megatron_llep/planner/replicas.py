"""Replica scheduling: tokens spread over the replicas that expert data parallelism holds anyway.

Shape letters: D replicas of every expert, P ranks of one expert-parallel group, M = E / P native
experts a rank, tp sources a rank, R = D * P * tp sources, replica-major, then by rank.

Rank (d, p), number d * P + p, holds replica d of the experts of p. Each replica counts as an
expert of its own, number d * E + e: then D * P ranks with D * E experts, M native to each, are an
ordinary planning problem, and whatever replicas cannot even out is lent as usual.

The experts of p are on the same D ranks, so the linear program of `planner.lp` falls apart into
one problem for each p: the D ranks share the tokens of p. Tokens stay in the row d of their source
unless its rank is above the level that is aimed at.
"""

from typing import Any

import numpy as np

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
    R, E = counts.shape
    row = np.arange(num_replicas)
    spread = np.zeros((num_replicas, R // num_replicas, num_replicas, E), dtype=np.int64)
    spread[row, :, row] = counts.reshape(num_replicas, -1, E)
    return spread.reshape(R, num_replicas * E)


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
    D, P = num_replicas, num_ranks // num_replicas
    R, E = counts.shape
    spread = stay_in_row(counts, D)
    load = load_per_rank(counts, D, num_ranks).reshape(D, P)
    target = _set_targets(load, lends)
    surplus = np.maximum(load - target, 0)
    if not surplus.any():
        return spread
    # Tokens that leave, and room for them: laid end to end, ranks p one after another.
    source, expert, leaving = _choose_leaving(counts, surplus, P)
    room = np.maximum(target - load, 0).T
    room_end = np.minimum(np.cumsum(room, axis=1), surplus.sum(axis=0)[:, None])
    filled = np.diff(room_end, axis=1, prepend=0).ravel()
    leaving_end, filled_end = np.cumsum(leaving), np.cumsum(filled)
    end = np.union1d(leaving_end, filled_end[filled > 0])
    start = np.concatenate(([0], end[:-1]))
    piece = np.searchsorted(leaving_end, start, side="right")
    replica = np.searchsorted(filled_end, start, side="right") % D
    source, expert = source[piece], expert[piece]
    spread = spread.reshape(R, D, E)
    spread[source, replica, expert] += end - start
    np.subtract.at(spread, (source, source // (R // D), expert), end - start)
    return spread.reshape(R, D * E)


def _drop_moves_of_replicas(
    plan: Plan, spread: np.ndarray, num_replicas: int
) -> tuple[Plan, np.ndarray]:
    """Where a rank borrows an expert that it has a replica of, send it the tokens alone.

    Takes and returns a plan for D * P ranks and the spread [R, D * E] it is for.
    """
    D, P = num_replicas, plan.num_ranks // num_replicas
    _, home, borrower = plan.transfers.T
    twins = plan.transfers[home % P == borrower % P].tolist()
    if not twins:
        return plan, spread
    quota, spread = plan.quota.copy(), spread.copy()
    R, E = len(spread), plan.num_experts // D
    for lent, _, borrower in twins:
        row = borrower // P
        native = row * E + lent % E
        tokens = quota[lent, borrower]
        quota[lent, borrower] = 0
        quota[native, borrower] += tokens
        # Of the sources, those in the borrower's row first.
        order = (np.arange(R) + row * (R // D)) % R
        moved = np.diff(np.minimum(np.cumsum(spread[order, lent]), tokens), prepend=0)
        spread[order, lent] -= moved
        spread[order, native] += moved
    return plan_from_quota(quota), spread


def _set_targets(load: np.ndarray, lends: bool) -> np.ndarray:
    """The most tokens that each rank shall keep or take from its replicas: [D, P] from [D, P].

    Ranks with more than the replicas can take in share it equally. With lending, then, no replica
    of what one rank lends is below the mean load: it would borrow what it holds.
    """
    D, P = load.shape
    total = load.sum(axis=0)
    share = total // D + (np.arange(D)[:, None] < total % D)
    if lends:
        level, extra = divmod(int(load.sum()), D * P)
        target = level + (np.arange(D * P) < extra).astype(np.int64).reshape(D, P)
    else:
        target = np.full((D, P), share.max())
    return np.where(total > target.sum(axis=0), share, target)


def _choose_leaving(
    counts: np.ndarray, surplus: np.ndarray, P: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take surplus [D, P] out of counts [R, E]: (source, expert, tokens), sorted by p.

    A rank's own tokens leave last: they are the ones that need not cross the wire.
    """
    D = len(surplus)
    R, E = counts.shape
    S, M = R // D, E // P
    tp = S // P
    own_last = (np.arange(S) + (np.arange(P)[:, None] + 1) * tp) % S  # [P, S]
    home = np.arange(P)[:, None]
    by_home = counts.reshape(D, S, P, M)[:, own_last, home].swapaxes(0, 1)  # [P, D, S, M]
    kept_out = np.minimum(np.cumsum(by_home.reshape(P, D, S * M), axis=2), surplus.T[:, :, None])
    leaving = np.diff(kept_out, axis=2, prepend=0)
    p, d, place = np.nonzero(leaving)
    source = d * S + own_last[p, place // M]
    return source, p * M + place % M, leaving[p, d, place]
