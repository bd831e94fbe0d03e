"""A plan that lends in every way at once, whatever the planners would do.

Letters: P ranks, E experts, M = E / P.
"""

import numpy as np
import pytest

from megatron_llep import dispatcher
from megatron_llep.planner import Plan, plan_from_quota
from megatron_llep.planner.plan import native_quota


def spread_experts(loads: np.ndarray, num_ranks: int) -> Plan:
    """All experts of rank 0 to all, the busiest of rank 1 to ranks 2 and 3, that of rank 2 to 3.

    Args:
        loads: int64 [E].
        num_ranks: P, 4 or more.
    """
    P, M = num_ranks, len(loads) // num_ranks
    quota = native_quota(loads, P)
    busiest = [r * M + int(loads[r * M : (r + 1) * M].argmax()) for r in range(P)]
    shared = {e: list(range(P)) for e in range(M)} | {busiest[1]: [1, 2, 3], busiest[2]: [2, 3]}
    for expert, ranks in shared.items():
        quota[expert] = 0
        share, more = divmod(int(loads[expert]), len(ranks))
        for place, rank in enumerate(ranks):
            quota[expert, rank] = share + (place < more)
    return plan_from_quota(quota)


def use_spread_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let token dispatchers plan with `spread_experts` from now on."""

    def plan(routed: np.ndarray, *, num_replicas: int, num_ranks: int, **options: object):
        assert num_replicas == 1
        return spread_experts(routed.sum(axis=0), num_ranks), routed

    monkeypatch.setattr(dispatcher, "plan_over_replicas", plan)
