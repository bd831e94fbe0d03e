"""The sizes of one rank's exchange of tokens, there and back.

Letters: P ranks that share tokens, M native and S foreign slots a rank, R = P * tp sources
(expert-parallel major; tp is the expert-tensor-parallel size), E experts.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_llep.planner import Plan, Topology, receives


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenExchange:
    """How many rows go and come. All on the host."""

    sent: list[int]
    """[P] rows to each rank."""
    received: list[int]
    """[P] rows from each rank."""
    gathered: list[int]
    """[tp] rows that each expert-tensor-parallel rank receives."""
    rows_per_source: torch.Tensor
    """int64 [R, M + S] rows of each source for each slot; the sources are tp-major."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        counts: np.ndarray,
        to_ranks: np.ndarray,
        *,
        rank: int,
        tp_rank: int,
        order: str,
        topology: Topology,
    ) -> "TokenExchange":
        """Of one rank, under a plan.

        Args:
            plan: for P ranks and E experts.
            counts: integers [R, E], tokens of each source for each expert.
            to_ranks: int [E, P], what this source sends, from `planner.sends`.
            rank: 0 .. P-1.
            tp_rank: 0 .. tp-1.
            order: as for `planner.receives`.
            topology: likewise.
        """
        per_slot = receives(plan, counts, rank, order, topology)
        P, num_slots = plan.num_ranks, per_slot.shape[1]
        per_slot = per_slot.reshape(P, -1, num_slots).transpose(1, 0, 2)  # [tp, P, M+S]
        per_rank = per_slot.sum(axis=2)
        return cls(
            sent=to_ranks.sum(axis=0).tolist(),
            received=per_rank[tp_rank].tolist(),
            gathered=per_rank.sum(axis=1).tolist(),
            rows_per_source=torch.from_numpy(per_slot.reshape(-1, num_slots)),
        )

    @cached_property
    def rows_per_slot(self) -> torch.Tensor:
        """int64 [M + S], from all sources."""
        return self.rows_per_source.sum(dim=0)
