"""How much each rank sends and receives under a plan: tokens, and experts lent.

Shape letters: P ranks, E experts, M = E / P, N nodes of G ranks, L experts that are lent. Arrays
[links, 2, P] hold what a rank sends, then what it receives; links: inside the node and, where there
are several nodes, across nodes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the planners import this module
    from megatron_llep.planner.plan import Plan
    from megatron_llep.planner.topology import Topology


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """What crosses the links in one dispatch, and in one lending. What stays put is not counted.

    Combine, and the exchanges of backward, carry the same, some of them the other way.
    """

    tokens: np.ndarray
    """float [links, 2, P] (token, expert) pairs."""
    experts: np.ndarray
    """int [links, 2, P] experts lent and borrowed."""


def count_traffic(plan: "Plan", counts: np.ndarray, topology: "Topology") -> Traffic:
    """Count what a plan moves if tokens stay on their rank first, then in their node.

    Which ranks of a node keep tokens of a lent expert inside it is averaged over the node: each
    in proportion to what it sends.

    Args:
        plan: made from the counts.
        counts: integers [P, E].
        topology: which ranks share a node.

    Raises:
        ValueError: the nodes do not divide the ranks.
    """
    P, M = plan.num_ranks, plan.experts_per_rank
    G = topology.node_size(P)
    expert, home, borrower = plan.transfers.T
    if G == P:
        kept = np.minimum(counts, plan.quota.T).sum(axis=1)
        ways = [counts.sum(axis=1) - kept, plan.quota.sum(axis=0) - kept]
        return Traffic(
            tokens=np.array([ways], dtype=float), experts=_count_ends(home, borrower, P)[None]
        )
    lent = np.unique(expert)
    columns = counts[:, lent]
    # [P, P] what each rank sends to each home of experts that are not lent.
    to_home = counts.reshape(P, P, M).sum(axis=2)
    np.subtract.at(to_home.T, lent // M, columns.T)
    np.fill_diagonal(to_home, 0)
    quota = plan.quota[lent].T
    kept = np.minimum(columns, quota)
    leaving, entering = columns - kept, quota - kept
    tokens = np.array([to_home.sum(axis=1), to_home.sum(axis=0)], dtype=float)
    tokens += [leaving.sum(axis=1), entering.sum(axis=1)]
    node = np.arange(P) // G
    to_home *= node[:, None] == node
    in_node = np.array([to_home.sum(axis=1), to_home.sum(axis=0)], dtype=float)
    in_node += _keep_in_node(leaving, entering, G)
    together = home // G == borrower // G
    return Traffic(
        tokens=np.array([in_node, tokens - in_node]),
        experts=np.array(
            [_count_ends(home[which], borrower[which], P) for which in (together, ~together)]
        ),
    )


def _keep_in_node(
    leaving: np.ndarray, entering: np.ndarray, G: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of pairs [P, L] that leave and enter each rank, [P] those that stay in its node, each."""
    P = len(leaving)
    parts = [part.astype(float).reshape(P // G, G, -1) for part in (leaving, entering)]
    totals = [part.sum(axis=1) for part in parts]  # [N, L]
    stays = np.minimum(*totals)
    kept = [
        (part @ (stays / np.maximum(total, 1))[:, :, None]).reshape(P)
        for part, total in zip(parts, totals, strict=True)
    ]
    return kept[0], kept[1]


def _count_ends(home: np.ndarray, borrower: np.ndarray, P: int) -> np.ndarray:
    """[2, P] transfers that start, and that end, at each rank."""
    return np.array([np.bincount(home, minlength=P), np.bincount(borrower, minlength=P)])
