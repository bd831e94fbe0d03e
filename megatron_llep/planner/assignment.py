"""Which source's tokens of an expert go to which of the ranks that hold it.

Shape letters: P ranks, E experts, M = E / P native and S foreign slots per rank, K a selection
of experts. R = P * tp sources: each rank of the expert-parallel group gathers the tokens of tp
tensor-parallel ranks, and source r belongs to expert-parallel rank r // tp.

`local_first`: a rank first keeps as many of its own tokens as its quota allows (of its sources
in tp order); then as many as possible stay within their node; the rest crosses nodes. In each of
these rounds what is left of the sources, in source order, fills what is left of the quotas, in
rank order. `rank_order`: all tokens do so in one round, as in the LLEP reference code. In both, a
source's tokens for one expert go out in rank order.
"""

from collections.abc import Iterator

import numpy as np

from megatron_llep.planner.plan import Plan
from megatron_llep.planner.topology import ONE_NODE, Topology

ORDERS = ("local_first", "rank_order")


def sends(
    plan: Plan,
    counts_by_source: np.ndarray,
    source: int,
    order: str = "local_first",
    topology: Topology = ONE_NODE,
) -> np.ndarray:
    """Count what one source sends: [E, P] tokens of each expert to each rank.

    Args:
        plan: made from the counts summed over the tp sources of each rank.
        counts_by_source: integers [R, E].
        source: 0 .. R-1.
        order: one of `ORDERS`.
        topology: which ranks share a node, for `local_first`.

    Raises:
        ValueError: unknown order, R is not a multiple of P, or P not one of `ranks_per_node`.
    """
    tp = _sources_per_rank(plan, counts_by_source, order)
    tokens = np.zeros_like(plan.quota)
    if plan.is_fallback:
        expert = np.arange(plan.num_experts)
        tokens[expert, expert // plan.experts_per_rank] = counts_by_source[source]
        return tokens
    # Of many replicas' experts a source uses few.
    used = np.flatnonzero(counts_by_source[source])
    reach = _reach(plan.num_ranks, order, topology)
    for size, sent, taken in _rounds(counts_by_source[:, used], plan.quota[used], reach):
        first = source // tp // size * size
        ranks = slice(first, first + size)
        end = sent[first * tp : source + 1].sum(axis=0)
        tokens[used, ranks] += _cut_out(taken[:, ranks], end - sent[source], end)
    return tokens


def receives(
    plan: Plan,
    counts_by_source: np.ndarray,
    rank: int,
    order: str = "local_first",
    topology: Topology = ONE_NODE,
) -> np.ndarray:
    """Count what one rank receives: [R, M + S] tokens from each source for each slot.

    Slots are the M native experts in order, then the foreign slots of `plan.foreign_experts`.
    An empty slot receives nothing. `sends` of every source agrees.

    Args:
        plan: made from the counts summed over the tp sources of each rank.
        counts_by_source: integers [R, E].
        rank: 0 .. P-1.
        order: one of `ORDERS`.
        topology: which ranks share a node, for `local_first`.

    Raises:
        ValueError: unknown order, R is not a multiple of P, or P not one of `ranks_per_node`.
    """
    tp = _sources_per_rank(plan, counts_by_source, order)
    M = plan.experts_per_rank
    if plan.is_fallback:
        return counts_by_source[:, rank * M : (rank + 1) * M].astype(np.int64)
    foreign = plan.foreign_experts[rank]
    held = np.concatenate([np.arange(rank * M, (rank + 1) * M), foreign[foreign >= 0]])
    tokens = np.zeros((len(counts_by_source), M + plan.max_foreign), dtype=np.int64)
    reach = _reach(plan.num_ranks, order, topology)
    for size, sent, taken in _rounds(counts_by_source[:, held], plan.quota[held], reach):
        first = rank // size * size
        sources = slice(first * tp, (first + size) * tp)
        end = taken[:, first : rank + 1].sum(axis=1)
        inside = _cut_out(sent[sources].T, end - taken[:, rank], end)
        tokens[sources, : len(held)] += inside.T
    return tokens


def _reach(num_ranks: int, order: str, topology: Topology) -> list[int]:
    """Ranks in a group, for each round: tokens stay within their group of that many ranks."""
    if order == "rank_order":
        return [num_ranks]
    return sorted({1, topology.node_size(num_ranks), num_ranks})


def _rounds(
    counts: np.ndarray, quota: np.ndarray, reach: list[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Give out counts [R, K] to quotas [K, P] in rounds of growing reach; the last gives out all.

    Yields the reach, the tokens sent by each source [R, K] and taken by each rank [K, P].
    """
    rest, room = counts.astype(np.int64, copy=False), quota
    for size in reach[:-1]:
        sent, taken = _match_within(rest, room, room.shape[1] // size)
        yield size, sent, taken
        rest, room = rest - sent, room - taken
    yield reach[-1], rest, room


def _match_within(
    rest: np.ndarray, room: np.ndarray, num_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Match what sources have [R, K] with what ranks have room for [K, P], each group its own.

    The first of the sources and the first of the ranks of a group come first. Returns the tokens
    sent [R, K] and taken [K, P].
    """
    if len(rest) == num_groups:  # a source and a rank each
        sent = np.minimum(rest, room.T)
        return sent, sent.T
    (R, K), P = rest.shape, room.shape[1]
    offered = np.cumsum(rest.reshape(num_groups, R // num_groups, K), axis=1)
    wanted = np.cumsum(room.T.reshape(num_groups, P // num_groups, K), axis=1)
    both = np.minimum(offered[:, -1:], wanted[:, -1:])
    sent = np.diff(np.minimum(offered, both), axis=1, prepend=0).reshape(R, K)
    taken = np.diff(np.minimum(wanted, both), axis=1, prepend=0).reshape(P, K)
    return sent, taken.T


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
