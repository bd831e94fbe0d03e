"""The sizes of one rank's exchange of tokens, there and back.

Letters: P ranks that share tokens, M native and S foreign slots a rank, R = P * tp sources
(expert-parallel major; tp is the expert-tensor-parallel size), E experts.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_llep.placement.arrivals import order_by_slot
from megatron_llep.planner import Plan, Topology, receives


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenExchange:
    """How many rows go and come, on the host; and in which order they come."""

    sent: list[int]
    """[P] rows to each rank."""
    received: list[int]
    """[P] rows from each rank."""
    gathered: list[int]
    """[tp] rows that each expert-tensor-parallel rank receives."""
    rows_per_source: np.ndarray
    """int64 [R, M + S] rows of each source for each slot; the sources are tp-major."""
    device: torch.device
    """Of the rows."""

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
        device: torch.device,
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
            device: of the tokens.
        """
        per_slot = receives(plan, counts, rank, order, topology)
        P, num_slots = plan.num_ranks, per_slot.shape[1]
        per_slot = per_slot.reshape(P, -1, num_slots).transpose(1, 0, 2)  # [tp, P, M+S]
        per_rank = per_slot.sum(axis=2)
        return cls(
            sent=to_ranks.sum(axis=0).tolist(),
            received=per_rank[tp_rank].tolist(),
            gathered=per_rank.sum(axis=1).tolist(),
            rows_per_source=per_slot.reshape(-1, num_slots),
            device=device,
        )

    @cached_property
    def rows_per_slot(self) -> torch.Tensor:
        """int64 [M + S], from all sources."""
        return torch.from_numpy(self.rows_per_source.sum(axis=0))

    @cached_property
    def by_slot(self) -> torch.Tensor | None:
        """As `order_by_slot`. Made when it is needed first: by then tokens are on their way."""
        return order_by_slot(self.rows_per_source, self.device)
