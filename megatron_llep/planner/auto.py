"""Plain expert parallelism or a planner's plan, whichever is predicted to be faster."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from megatron_llep.planner.cost.picoseconds import to_picoseconds
from megatron_llep.planner.plan import Plan
from megatron_llep.planner.topology import ONE_NODE, Topology

if TYPE_CHECKING:
    from megatron_llep.planner.cost.model import LayerCost

TOLERANCES = (0.25, 0.05)
"""Of the `tolerant` plans that are tried; from few transfers to many."""


def choose_plan(
    plan: Callable[..., Plan], counts: np.ndarray, topology: Topology, cost: "LayerCost"
) -> Plan:
    """Of plain expert parallelism and the plans of all planners that lend, the fastest predicted.

    Times are compared in whole nanoseconds, which are the same on every CPU, so ranks choose alike.
    Among equals the one that was tried first, with fewer transfers. Nothing is tried where even
    perfect balance would save less than planning and placing cost.

    Args:
        plan: plans for the counts with a planner, `tolerance` and `topology`; "lp" lends nothing.
        counts: integers [P, E] tokens of each rank for each expert.
        topology: of the P ranks.
        cost: the machine and the layer.
    """
    best = plan("lp")
    time = cost.predict(best, counts, topology)
    # (1 - mean / largest load) of that time is all that balance can save, on one node.
    load = best.load_per_rank_before
    slowest = len(load) * int(load.max())
    saved = to_picoseconds(time.compute + time.exchange) * (slowest - int(load.sum()))
    several_nodes = topology.node_size(len(load)) < len(load)
    if not several_nodes and saved <= to_picoseconds(cost.model.planning_seconds) * slowest:
        return best
    least = time.nanoseconds
    tried = [best.quota]
    tries = [partial(plan, "tolerant", tolerance) for tolerance in TOLERANCES]
    tries += [partial(plan, "exact"), partial(plan, "lla")]
    if several_nodes and topology.lend_across_nodes:  # planned as if there were one
        tries += [partial(plan, planner, topology=ONE_NODE) for planner in ("tolerant", "exact")]
    for make in tries:
        new = make()
        if any(np.array_equal(new.quota, quota) for quota in tried):
            continue
        tried.append(new.quota)
        needed = cost.predict(new, counts, topology).nanoseconds
        if needed < least:
            best, least = new, needed
    return best
