"""Which slot of which rank holds an expert, read off a plan."""

import numpy as np

from megatron_llep.planner import Plan


def slot_of_expert(plan: Plan) -> np.ndarray:
    """[P, E] slot (0 .. M+S-1) of each expert on each rank, -1 where the rank lacks it."""
    P, E, M = plan.num_ranks, plan.num_experts, plan.experts_per_rank
    slot = np.full((P, E), -1, dtype=np.int64)
    expert = np.arange(E)
    slot[expert // M, expert] = expert % M
    rank, foreign_slot = np.nonzero(plan.foreign_experts >= 0)
    slot[rank, plan.foreign_experts[rank, foreign_slot]] = M + foreign_slot
    return slot
