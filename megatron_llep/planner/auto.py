"""Plain expert parallelism or a planner's plan, whichever is predicted to be faster.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

from typing import TYPE_CHECKING

import numpy as np

from megatron_llep.planner.cost.picoseconds import to_picoseconds
from megatron_llep.planner.exact import exact_moves
from megatron_llep.planner.plan import Plan, PlanMove, plan_from_moves
from megatron_llep.planner.tolerant import tolerant_moves
from megatron_llep.planner.topology import Topology

if TYPE_CHECKING:
    from megatron_llep.planner.cost.model import LayerCost

TOLERANCES = (0.25, 0.05)
"""Of the `tolerant` plans that are tried; from few transfers to many."""


def choose_plan(
    counts: np.ndarray,
    loads: np.ndarray,
    rank_loads: list[int],
    max_foreign: int,
    topology: Topology,
    cost: "LayerCost",
) -> Plan:
    """Of plain expert parallelism, `tolerant` and `exact`, the one with the least predicted time.

    Times are compared in whole nanoseconds, which are the same on every CPU, so ranks choose alike.
    Among equals the one that was tried first, with fewer transfers. Nothing is tried where even
    perfect balance would save less than planning and placing cost.

    Args:
        counts: int64 [P, E] tokens of each rank for each expert.
        loads: int64 [E], their sums over ranks.
        rank_loads: [P] tokens per rank under plain expert parallelism.
        max_foreign: most foreign experts per rank, 0 .. M.
        topology: of the P ranks.
        cost: the machine and the layer.
    """
    best = plan_from_moves(loads, rank_loads, [])
    time = cost.predict(best, counts, topology)
    # (1 - mean / largest load) of that time is all that balance can save.
    slowest = len(rank_loads) * max(rank_loads)
    saved = to_picoseconds(time.compute + time.exchange) * (slowest - sum(rank_loads))
    if saved <= to_picoseconds(cost.model.planning_seconds) * slowest:
        return best
    least = time.nanoseconds
    tried: list[list[PlanMove]] = [[]]
    for tolerance in (*TOLERANCES, None):
        if tolerance is None:
            moves = exact_moves(loads, rank_loads, max_foreign, topology)
        elif best.imbalance_before > 1 + tolerance:
            moves = tolerant_moves(loads, rank_loads, max_foreign, topology, tolerance=tolerance)
        else:
            continue
        if moves in tried:
            continue
        tried.append(moves)
        plan = plan_from_moves(loads, rank_loads, moves)
        needed = cost.predict(plan, counts, topology).nanoseconds
        if needed < least:
            best, least = plan, needed
    return best
