"""How much each rank sends and receives under a plan: tokens, and experts lent.

Shape letters: P ranks, E experts, M = E / P, N nodes of G ranks, L experts that are lent, W numbers
in an expert's weights, k ranks that borrow an expert, n transfers. Arrays [links, 2, P] hold what a
rank sends, then what it receives; links: inside the node and, where there are several nodes, across
nodes.

An expert with k borrowers that goes whole loads its home's link with k W numbers out, and each
borrower's with W in. In shards (`fan_out`): the home's with W out; each borrower's with W in, and
(k-1)/k W out in the second exchange. Its gradients load the same links with as many numbers the
other way, in the opposite order.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_llep.lending.fan_out import cut_shards, travel_in_shards
from megatron_llep.planner.assignment import sends

if TYPE_CHECKING:  # the planners import this module
    from megatron_llep.planner.plan import Plan
    from megatron_llep.planner.topology import Topology

_PARTS_OF_A_PAIR = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkLoad:
    """What crosses the links in one exchange of lent experts.

    The exchange of their gradients carries the same the other way.
    """

    numbers: np.ndarray
    """int [links, 2, P] of the experts' weights."""
    messages: np.ndarray
    """int [links, 2, P] experts, or shards of them."""


def count_tokens(
    plan: "Plan", counts: np.ndarray, topology: "Topology", order: str = "local_first"
) -> np.ndarray:
    """Count what a dispatch moves.

    What stays put is not counted. Combine, and the exchanges of backward, carry the same, some of
    them the other way.

    Local first, tokens stay on their rank as far as they can, then in their node. Which ranks of a
    node keep tokens of a lent expert inside it is averaged over the node: each in proportion to
    what it sends, in whole parts of 2**-20, so that sums over experts are exact: the same on every
    CPU, in whatever order it adds.

    Args:
        plan: made from the counts.
        counts: integers [P, E].
        topology: which ranks share a node.
        order: of `planner.assignment.ORDERS`.

    Returns:
        float [links, 2, P] (token, expert) pairs.

    Raises:
        ValueError: unknown order, or the nodes do not divide the ranks.
    """
    P, M = plan.num_ranks, plan.experts_per_rank
    G = topology.node_size(P)
    if order != "local_first":
        return _count_sent(plan, counts, G, order)
    if G == P:
        kept = np.minimum(counts, plan.quota.T).sum(axis=1)
        ways = [counts.sum(axis=1) - kept, plan.quota.sum(axis=0) - kept]
        return np.array([ways], dtype=float)
    lent = np.unique(plan.transfers[:, 0])
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
    return np.array([in_node, tokens - in_node])


def count_lending(
    plan: "Plan", width: int, scatter_from: int, topology: "Topology"
) -> tuple[LinkLoad, ...]:
    """Count what each exchange of lent experts moves.

    Args:
        plan: which experts are lent.
        width: W.
        scatter_from: borrowers from which on an expert goes in shards; 0: none does.
        topology: which ranks share a node.

    Returns:
        One, or two if some expert goes in shards: the shards that borrowers send each other.

    Raises:
        ValueError: the nodes do not divide the ranks.
    """
    P = plan.num_ranks
    G = topology.node_size(P)
    expert, home, borrower = plan.transfers.T
    scattered = travel_in_shards(np.bincount(expert, minlength=1), scatter_from)
    if not scattered.any():
        return (_sum_up(home, borrower, np.full(len(expert), width), P, G),)
    sizes = np.full(len(expert), width)
    sources, targets, shared = [], [], []
    for e in np.flatnonzero(scattered):
        rows = np.flatnonzero(expert == e)
        sizes[rows] = shards = np.diff(cut_shards(width, len(rows)))
        source, target = np.nonzero(~np.eye(len(rows), dtype=bool))
        sources.append(borrower[rows[source]])
        targets.append(borrower[rows[target]])
        shared.append(shards[source])
    source, target, shards = map(np.concatenate, (sources, targets, shared))
    return _sum_up(home, borrower, sizes, P, G), _sum_up(source, target, shards, P, G)


def _sum_up(source: np.ndarray, target: np.ndarray, sizes: np.ndarray, P: int, G: int) -> LinkLoad:
    """What [n] messages from ranks to ranks, of so many numbers, do to the links."""
    links = [slice(None)]
    if G < P:
        together = source // G == target // G
        links = [together, ~together]

    def count(weights: np.ndarray | None) -> np.ndarray:
        return np.array(
            [
                [
                    np.bincount(end[link], None if weights is None else weights[link], P)
                    for end in (source, target)
                ]
                for link in links
            ]
        ).astype(np.int64, copy=False)

    return LinkLoad(numbers=count(sizes), messages=count(None))


def _count_sent(plan: "Plan", counts: np.ndarray, G: int, order: str) -> np.ndarray:
    """Float [links, 2, P] of what every rank sends, counted one by one."""
    P = plan.num_ranks
    sent = np.stack([sends(plan, counts, rank, order).sum(axis=0) for rank in range(P)])  # [P, P]
    np.fill_diagonal(sent, 0)
    node = np.arange(P) // G
    together = node[:, None] == node
    links = [sent] if G == P else [sent * together, sent * ~together]
    return np.array([[link.sum(axis=1), link.sum(axis=0)] for link in links], dtype=float)


def _keep_in_node(
    leaving: np.ndarray, entering: np.ndarray, G: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of pairs [P, L] that leave and enter each rank, [P] those that stay in its node, each."""
    P = len(leaving)
    parts = [part.reshape(P // G, G, -1) for part in (leaving, entering)]
    totals = [part.sum(axis=1) for part in parts]  # [N, L]
    stays = np.minimum(*totals)
    kept = []
    for part, total in zip(parts, totals, strict=True):
        shares = part * (stays / np.maximum(total, 1))[:, None]
        whole = np.rint(shares * _PARTS_OF_A_PAIR).astype(np.int64)
        kept.append(whole.sum(axis=2).reshape(P) / _PARTS_OF_A_PAIR)
    return kept[0], kept[1]
