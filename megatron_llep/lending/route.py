"""Which experts one rank sends to whom, and how many it gets from whom, under one plan.

Letters: P ranks of the expert-parallel group, M native experts a rank, L experts this rank lends
(an expert lent twice counts twice).
"""

from dataclasses import dataclass

import numpy as np

from megatron_llep.planner import Plan


@dataclass(frozen=True, kw_only=True)
class Route:
    """One rank's part of a plan's transfers; backward takes it the other way."""

    lent: tuple[int, ...]
    """L native experts (0..M-1), in the order in which they are sent: by borrower, expert."""
    sends: tuple[int, ...]
    """Experts sent to each of the P ranks."""
    receives: tuple[int, ...]
    """Experts received from each of the P ranks; foreign slots are in the same order."""

    @classmethod
    def of(cls, plan: Plan, rank: int) -> "Route":
        """The transfers of the plan, in their order, that `rank` takes part in."""
        expert, home, borrower = plan.transfers.T
        is_lender, is_borrower = home == rank, borrower == rank
        return cls(
            lent=tuple((expert[is_lender] - rank * plan.experts_per_rank).tolist()),
            sends=tuple(np.bincount(borrower[is_lender], minlength=plan.num_ranks).tolist()),
            receives=tuple(np.bincount(home[is_borrower], minlength=plan.num_ranks).tolist()),
        )
