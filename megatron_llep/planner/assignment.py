"""Which source's tokens of an expert go to which of the ranks that hold it.

Shape letters: P ranks, E experts, M = E / P native and S foreign slots per rank, K a selection
of experts. R = P * tp sources: each rank of the expert-parallel group gathers the tokens of tp
tensor-parallel ranks, and source r belongs to expert-parallel rank r // tp.

`local_first`: a rank first keeps as many of its own tokens as its quota allows (of its sources
in tp order); what is left of the sources, in source order, fills what is left of the quotas, in
rank order. `rank_order`: all tokens in source order fill the quotas in rank order, as in the
LLEP reference code. In both, a source's tokens for one expert go out in rank order.
"""

import numpy as np

from megatron_llep.planner.plan import Plan

ORDERS = ("local_first", "rank_order")


def sends(
    plan: Plan, counts_by_source: np.ndarray, source: int, order: str = "local_first"
) -> np.ndarray:
    """Count what one source sends: [E, P] tokens of each expert to each rank.

    Args:
        plan: made from the counts summed over the tp sources of each rank.
        counts_by_source: integers [R, E].
        source: 0 .. R-1.
        order: one of `ORDERS`.

    Raises:
        ValueError: unknown order, or R is not a multiple of P.
    """
    tp = _sources_per_rank(plan, counts_by_source, order)
    kept, rest, room = _split(counts_by_source, plan.quota, tp, order)
    rest_end = rest[: source + 1].sum(axis=0)
    tokens = _cut_out(room, rest_end - rest[source], rest_end)
    tokens[:, source // tp] += kept[source]
    return tokens


def receives(
    plan: Plan, counts_by_source: np.ndarray, rank: int, order: str = "local_first"
) -> np.ndarray:
    """Count what one rank receives: [R, M + S] tokens from each source for each slot.

    Slots are the M native experts in order, then the foreign slots of `plan.foreign_experts`.
    An empty slot receives nothing. `sends` of every source agrees.

    Args:
        plan: made from the counts summed over the tp sources of each rank.
        counts_by_source: integers [R, E].
        rank: 0 .. P-1.
        order: one of `ORDERS`.

    Raises:
        ValueError: unknown order, or R is not a multiple of P.
    """
    tp = _sources_per_rank(plan, counts_by_source, order)
    M = plan.experts_per_rank
    foreign = plan.foreign_experts[rank]
    held = np.concatenate([np.arange(rank * M, (rank + 1) * M), foreign[foreign >= 0]])
    kept, rest, room = _split(counts_by_source[:, held], plan.quota[held], tp, order)
    room_end = room[:, : rank + 1].sum(axis=1)
    tokens = np.zeros((len(counts_by_source), M + plan.max_foreign), dtype=np.int64)
    tokens[:, : len(held)] = _cut_out(rest.T, room_end - room[:, rank], room_end).T
    own = slice(rank * tp, (rank + 1) * tp)
    tokens[own, : len(held)] += kept[own]
    return tokens


def _split(
    counts: np.ndarray, quota: np.ndarray, tp: int, order: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take the tokens that stay on their rank out of counts [R, K] and quotas [K, P].

    Returns kept [R, K], the rest of the counts [R, K], and the rest of the quotas [K, P].
    """
    counts = counts.astype(np.int64, copy=False)
    if order == "rank_order":
        return np.zeros_like(counts), counts, quota
    P, K = quota.shape[1], len(quota)
    if tp == 1:
        kept = np.minimum(counts, quota.T)
        return kept, counts - kept, quota - kept.T
    by_rank = counts.reshape(P, tp, K)
    kept_so_far = np.minimum(np.cumsum(by_rank, axis=1), quota.T[:, None, :])
    kept = np.diff(kept_so_far, axis=1, prepend=0).reshape(counts.shape)
    return kept, counts - kept, quota - kept_so_far[:, -1].T


def _cut_out(lengths: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Lay segments end to end and cut out [start, end).

    From lengths [K, N], start [K] and end [K], returns how much of each segment is inside
    [K, N].
    """
    ends = np.cumsum(lengths, axis=1)
    np.clip(ends, start[:, None], end[:, None], out=ends)
    inside = np.empty_like(ends)
    np.subtract(ends[:, 0], start, out=inside[:, 0])
    np.subtract(ends[:, 1:], ends[:, :-1], out=inside[:, 1:])
    return inside


def _sources_per_rank(plan: Plan, counts_by_source: np.ndarray, order: str) -> int:
    """Return tp, after checking the arguments that `sends` and `receives` share."""
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown: choose one of {', '.join(ORDERS)}")
    R = len(counts_by_source)
    if R == 0 or R % plan.num_ranks or counts_by_source.shape[1:] != (plan.num_experts,):
        raise ValueError(
            f"counts_by_source is {list(counts_by_source.shape)}, expected "
            f"[{plan.num_ranks} * tp, {plan.num_experts}]"
        )
    return R // plan.num_ranks
