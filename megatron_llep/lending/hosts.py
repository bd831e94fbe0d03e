"""Which ranks share a node, as their hostnames tell."""

from collections.abc import Sequence
from itertools import groupby


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
