"""Which ranks share a node, as their hostnames tell."""

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_llep.lending.groups import gather_objects
from megatron_llep.planner.topology import find_ranks_per_node


@dataclass(frozen=True)
class Hosts:
    """The host of each rank of the job."""

    names: tuple[str, ...]

    @classmethod
    def gather(cls) -> "Hosts":
        """Learn them; all ranks of the job call it."""
        return cls(tuple(gather_objects(socket.gethostname())))

    def find_ranks_per_node(self, ranks: Sequence[int]) -> int | None:
        """As the function, of ranks of the job."""
        return find_ranks_per_node([self.names[rank] for rank in ranks])

    def list_mixed(self, groups: Iterable[Sequence[int]]) -> list[str]:
        """A line where nodes cannot be told, of groups of ranks that share tokens."""
        mixed = [ranks for ranks in groups if self.find_ranks_per_node(ranks) is None]
        return [
            f"ranks {list(ranks)}, which share tokens, are not spread evenly over hosts, one after "
            "another, and count as one node: see --moe-llep-ranks-per-node"
            for ranks in mixed[:1]
        ]
