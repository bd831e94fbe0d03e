"""Which ranks share a node, as their hostnames tell."""

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_llep.lending.groups import gather_objects


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
