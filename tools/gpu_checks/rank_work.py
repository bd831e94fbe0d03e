"""What each rank's experts have to do under a plan, and which ranks need to be run.

Shape letters: P ranks, E experts, M = E / P native slots a rank, F foreign slots in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llep.offline.timing import median_seconds
from megatron_llep.offline.workloads import make_counts
from megatron_llep.placement import order_chunks
from megatron_llep.planner import Plan, make_plan, receives, sends, slot_of_expert
from megatron_llep.planner.cost.model import LayerShape

PLAIN = "plain"
NUM_RANKS = 8
"""P, as in the paper's Figure 4."""
_SAME_SHARE, _SAME_PAIRS = 0.01, 8
_PLAN_REPEATS = 9

Load = tuple[int, ...]
"""Pairs of each slot of one rank: M natives, then its foreign ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One workload under plain expert parallelism or one planner."""

    workload: str
    method: str
    counts: np.ndarray
    """[P, E]."""
    plan: Plan
    plan_seconds: float
    """Host work for one layer: plan, split sizes, order of chunks; 0 under plain."""

    @property
    def chosen(self) -> list[Load]:
        """Of the ranks that must be run."""
        return choose_loads([slot_load(self.plan, rank) for rank in range(NUM_RANKS)])


def make_cases(
    shape: LayerShape, workload: str, methods: Sequence[str], tokens_per_rank: int
) -> list[Case]:
    """Plan one workload under every method, and time the planning.

    As in the published LLEP benchmark, a token may choose an expert several times: "95% into 1
    expert" is 95% of all (token, expert) pairs.
    """
    counts = make_counts(
        workload,
        num_ranks=NUM_RANKS,
        num_experts=shape.num_experts,
        tokens_per_rank=tokens_per_rank * shape.top_k,
        top_k=1,
    )
    cases = []
    for method in methods:
        options = {"planner": "exact", "max_foreign": 0} if method == PLAIN else {"planner": method}
        plan = make_plan(counts, **options)
        seconds = 0.0 if method == PLAIN else _time_planning(counts, method)
        cases.append(
            Case(workload=workload, method=method, counts=counts, plan=plan, plan_seconds=seconds)
        )
    return cases


def slot_load(plan: Plan, rank: int) -> Load:
    """Pairs of each slot of a rank."""
    M = plan.experts_per_rank
    foreign = plan.foreign_experts[rank]
    experts = [*range(rank * M, (rank + 1) * M), *foreign[foreign >= 0].tolist()]
    return tuple(plan.quota[experts, rank].tolist())


def choose_loads(loads: Sequence[Load]) -> list[Load]:
    """The loads that one of these ranks must be run with to find the slowest.

    Left out are empty ranks, equal ranks, and ranks that have no more to do than another in any
    slot, slots sorted by load, and no more slots; a difference of 1%, or of a few pairs, does not
    count.
    """
    chosen: list[Load] = []
    for load in sorted(set(loads), key=sum, reverse=True):
        if sum(load) and not any(_covers(other, load) for other in chosen):
            chosen.append(load)
    return chosen


def _covers(larger: Load, smaller: Load) -> bool:
    ours, theirs = sorted(larger, reverse=True), sorted(smaller, reverse=True)
    return len(theirs) <= len(ours) and all(
        their <= our * (1 + _SAME_SHARE) + _SAME_PAIRS
        for our, their in zip(ours, theirs, strict=False)
    )


def _time_planning(counts: np.ndarray, planner: str) -> float:
    """Median seconds of the host's work from counts to split sizes and chunks, for rank 0."""

    def work() -> None:
        plan = make_plan(counts, planner=planner)
        if not plan.is_fallback:
            slots = plan.experts_per_rank + plan.max_foreign
            order_chunks(sends(plan, counts, 0), slot_of_expert(plan), slots)
            receives(plan, counts, 0)

    return median_seconds(work, _PLAN_REPEATS)
