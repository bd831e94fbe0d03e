"""Which ranks share a node where routing is replayed, and who says so."""

from dataclasses import dataclass

from megatron_llep.planner.topology import ONE_NODE, Topology


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Of the P ranks that share tokens."""

    num_ranks: int
    """P."""
    ranks_per_node: int
    """P where all are on one."""
    source: str
    """Who says so, in words."""

    @property
    def number(self) -> int:
        """How many."""
        return self.num_ranks // self.ranks_per_node

    @property
    def topology(self) -> Topology:
        """For planners."""
        return make_topology(self.ranks_per_node, self.num_ranks)

    def __str__(self) -> str:
        if self.number == 1:
            return f"1 node, {self.source}"
        return f"{self.number} nodes of {self.ranks_per_node} ranks, {self.source}"


def find_nodes(asked: int | None, num_ranks: int, recorded: int | None = None) -> Nodes:
    """What is asked for, else what was recorded, else one node.

    Args:
        asked: `--ranks-per-node`; as many as there are ranks, or more, are on one node.
        num_ranks: P.
        recorded: ranks on a node; None where nobody knows.

    Raises:
        ValueError: P ranks are not spread evenly over such nodes.
    """
    per_node, source = asked, "as told"
    if asked is None:
        per_node, source = recorded, "as recorded"
    if per_node is None:
        per_node, source = num_ranks, "an assumption, give --ranks-per-node if there are more"
    if per_node < 1 or num_ranks % min(per_node, num_ranks):
        raise ValueError(
            f"--ranks-per-node {per_node} does not divide the {num_ranks} ranks that share tokens: "
            "give how many of them are on each node, or leave it out"
        )
    return Nodes(num_ranks=num_ranks, ranks_per_node=min(per_node, num_ranks), source=source)


def make_topology(ranks_per_node: int | None, num_ranks: int) -> Topology:
    """A group that fits into a node is on one."""
    if ranks_per_node is None or ranks_per_node >= num_ranks:
        return ONE_NODE
    return Topology(ranks_per_node=ranks_per_node)
