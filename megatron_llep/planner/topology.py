"""How the ranks of one expert-parallel group are laid out over nodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Which ranks share a node, and whether an expert may be lent to another node.

    Raises:
        ValueError: `ranks_per_node` is below 1.
    """

    ranks_per_node: int | None = None
    """Ranks of the group on one node, consecutive in rank order; None: all are on one node."""
    lend_across_nodes: bool = True
    """False: an expert is lent to ranks of its home's node only, so each node balances itself."""

    def __post_init__(self) -> None:
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node={self.ranks_per_node} must be at least 1")

    def node_of(self, rank: int) -> int:
        """Number of the node that a rank is on."""
        return rank // self.ranks_per_node if self.ranks_per_node else 0

    def node_size(self, num_ranks: int) -> int:
        """Ranks per node of a group of P = `num_ranks`.

        Raises:
            ValueError: `ranks_per_node` does not divide P.
        """
        size = self.ranks_per_node or num_ranks
        if num_ranks % size:
            raise ValueError(
                f"ranks_per_node={size} does not divide the {num_ranks} expert-parallel ranks: "
                "give the number of ranks of the group on each node, or leave it out"
            )
        return size


ONE_NODE = Topology()


def find_ranks_per_node(hosts: Sequence[str]) -> int | None:
    """Ranks on each node of a group, if these follow each other and are as many on every node.

    Args:
        hosts: of the group's ranks, in their order.

    Returns:
        None where nodes cannot be told: the group counts as one then.
    """
    runs = [(host, len(list(ranks))) for host, ranks in groupby(hosts)]
    names, sizes = zip(*runs, strict=True)
    is_even = len(set(names)) == len(names) and len(set(sizes)) == 1
    return sizes[0] if is_even else None
