"""One rank's exchange of tokens, there and back: in which order rows go and come, and how many.

Letters: P ranks that share tokens, M native and S foreign slots a rank, R = P * tp sources
(expert-parallel major; tp is the expert-tensor-parallel size), E experts, D replicas of each
(1, unless tokens are spread over replicas), C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_llep.placement.arrivals import order_by_slot
from megatron_llep.planner import Plan, Topology, list_exchange


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenExchange:
    """What goes and comes, on the host."""

    chunks: np.ndarray
    """int64 [3, C], first pair, length and physical slot of each chunk of this source, by slot."""
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
        source: int,
        *,
        num_replicas: int,
        order: str,
        topology: Topology,
        device: torch.device,
    ) -> "TokenExchange":
        """Of one source, under a plan.

        Args:
            plan: for P ranks and D * E experts.
            counts: integers [R, D * E], tokens of each source for each expert.
            source: 0 .. R-1.
            num_replicas: D.
            order: as for `planner.list_exchange`.
            topology: likewise.
            device: of the tokens.
        """
        listed = list_exchange(plan, counts, source, order, topology, num_replicas)
        chunks, sent, received, by_slot = listed
        return cls(
            chunks=chunks,
            sent=sent.tolist(),
            received=received[source % len(received)].tolist(),
            gathered=[sum(from_ranks) for from_ranks in received.tolist()],
            rows_per_source=by_slot.reshape(-1, by_slot.shape[2]),
            device=device,
        )

    @cached_property
    def rows_per_slot(self) -> torch.Tensor:
        """int64 [M + S], from all sources."""
        return torch.from_numpy(self.rows_per_source.sum(axis=0))

    def rows_of(self, parts: Sequence[int]) -> list[int]:
        """Rows from all sources for each part of the slots, which has so many slots."""
        return [int(of_part.sum()) for of_part in self.rows_per_slot.split(list(parts))]

    @cached_property
    def by_slot(self) -> torch.Tensor | None:
        """As `order_by_slot`. Made when it is needed first: by then tokens are on their way."""
        return order_by_slot(self.rows_per_source, self.device)
