"""Which source's tokens of an expert go to which of the ranks that hold it.

Shape letters: P ranks, E experts, M = E / P native and S foreign slots per rank. R = P * tp
sources: each rank of the expert-parallel group gathers the tokens of tp tensor-parallel ranks, and
source r belongs to expert-parallel rank r // tp.

`local_first`: a rank first keeps as many of its own tokens as its quota allows (of its sources
in tp order); then as many as possible stay within their node; the rest crosses nodes. In each of
these rounds what is left of the sources, in source order, fills what is left of the quotas, in
rank order. `rank_order`: all tokens do so in one round, as in the LLEP reference code. In both, a
source's tokens for one expert go out in rank order.
"""

import numpy as np

from megatron_llep.planner.compiled import compiled
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
    _check(plan, counts_by_source, order)
    return compiled("assignment.count_sends")(
        np.ascontiguousarray(counts_by_source, np.int64),
        plan.quota,
        plan.transfers,
        source,
        topology.node_size(plan.num_ranks),
        order == "local_first",
    )


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
    _check(plan, counts_by_source, order)
    return compiled("assignment.count_receives")(
        np.ascontiguousarray(counts_by_source, np.int64),
        plan.quota,
        plan.foreign_experts,
        rank,
        topology.node_size(plan.num_ranks),
        order == "local_first",
    )


def list_exchange(
    plan: Plan,
    counts_by_source: np.ndarray,
    source: int,
    order: str = "local_first",
    topology: Topology = ONE_NODE,
    num_replicas: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """List what one source sends, as `sends` has it, and its rank receives, as `receives` has it.

    A *chunk* is the source's pairs of one (expert, holder). Of D replicas of an expert each counts
    as an expert; they are replica-major.

    Args:
        plan: made from the counts summed over the tp sources of each rank.
        counts_by_source: integers [R, E].
        source: 0 .. R-1.
        order: one of `ORDERS`.
        topology: which ranks share a node, for `local_first`.
        num_replicas: D.

    Returns:
        int64 [3, C], first pair, length and physical slot, rank * (M + S) + slot, of each chunk
        that is not empty, by slot; pairs are ordered by expert, then replica. int64 [P], pairs to
        each rank. int64 [tp, P] and [tp, P, M + S], pairs from each source, in all and for each
        slot of its rank.

    Raises:
        ValueError: unknown order, R is not a multiple of P, or P not one of `ranks_per_node`.
    """
    _check(plan, counts_by_source, order)
    return compiled("exchange.list_exchange")(
        np.ascontiguousarray(counts_by_source, np.int64),
        plan.quota,
        plan.foreign_experts,
        plan.transfers,
        source,
        num_replicas,
        topology.node_size(plan.num_ranks),
        order == "local_first",
    )


def _check(plan: Plan, counts_by_source: np.ndarray, order: str) -> None:
    """Check the arguments that all of these share."""
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown: choose one of {', '.join(ORDERS)}")
    R = len(counts_by_source)
    if R == 0 or R % plan.num_ranks or counts_by_source.shape[1:] != (plan.num_experts,):
        raise ValueError(
            f"counts_by_source is {list(counts_by_source.shape)}, expected "
            f"[{plan.num_ranks} * tp, {plan.num_experts}]"
        )
