"""Which ranks send to which where one kind of link is timed.

Shape letters: P ranks, R of them on each node.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """The ranks' ways over one kind of link: inside their nodes, or between these."""

    allowed: np.ndarray
    """bool [P, P]: one may send to the other; as many for each rank."""
    next_to: np.ndarray
    """[P]: of the ranks that each may send to, its own; no two have the same."""
    leads: np.ndarray
    """bool [P]: the ranks that send where one way is timed, each to the one next to it."""

    @property
    def is_empty(self) -> bool:
        """Nobody may send to anybody."""
        return not self.allowed.any()


def reach_inside(P: int, R: int) -> Reach:
    """To ranks of the own node; the first of each leads. Empty with one rank a node."""
    ranks = np.arange(P)
    node, place = ranks // R, ranks % R
    return Reach(
        allowed=(node[:, None] == node) & (ranks[:, None] != ranks),
        next_to=node * R + (place + 1) % R,
        leads=place == 0,
    )


def reach_across(P: int, R: int) -> Reach:
    """To ranks of other nodes; of two nodes that follow each other all ranks of the first lead.

    So a node's ranks share what carries their bytes, as in training. Empty with one node.
    """
    ranks = np.arange(P)
    node = ranks // R
    return Reach(
        allowed=node[:, None] != node,
        next_to=(ranks + R) % P,
        leads=(node % 2 == 0) & (ranks + R < P),
    )
