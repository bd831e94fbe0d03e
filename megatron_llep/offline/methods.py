"""What may balance a layer, by one name each: plain expert parallelism, and the planners.

Shape letters: P ranks, E experts.
"""

from collections.abc import Sequence

import numpy as np

from megatron_llep.planner import Plan, Topology, make_plan
from megatron_llep.planner.cost.model import LayerCost

METHODS = ("plain", "tolerant", "exact", "lla", "auto")
"""plain: expert parallelism without lending; the others are planners."""


def check_methods(methods: Sequence[str], flag: str) -> tuple[str, ...]:
    """The methods, each once, in the order of `METHODS`.

    Raises:
        ValueError: one is unknown; names the flag and what it may be.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"{flag} {method} is unknown: choose of {', '.join(METHODS)}")
    return tuple(method for method in METHODS if method in methods)


def plan_method(
    counts: np.ndarray, method: str, topology: Topology, cost: LayerCost | None = None
) -> Plan:
    """Plan one layer of one micro-batch as a method does with its default options.

    Args:
        counts: integers [P, E], tokens of each rank for each expert.
        method: of `METHODS`.
        topology: of the P ranks.
        cost: the machine and the layer; `auto` needs it.
    """
    if method == "plain":
        return make_plan(counts, planner="exact", max_foreign=0, topology=topology)
    return make_plan(counts, planner=method, topology=topology, cost=cost)
