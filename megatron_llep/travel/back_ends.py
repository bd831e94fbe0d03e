"""What is particular to each back end of Megatron's flex dispatcher.

Letters: T tokens of this rank, H hidden size, E experts, tp the expert-tensor-parallel size, R
ranks that exchange tokens, M native and S foreign slots a rank, V = R * (M + S) slots, N pairs,
K experts of a token, A tokens and n rows that arrive.

Each of a token's pairs goes to its slot on all tp ranks that hold a part of the expert. A back end
adds up, for each token, what those ranks send back.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_llep.placement import Placement, gather_rows, place_tokens
from megatron_llep.travel.sums import add_up

Rows = tuple[torch.Tensor, torch.Tensor]
"""Rows [n, H] by slot, and the router's weight of each, [n]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Addresses:
    """Where the pairs of one rank go, in the order of slots."""

    routing_map: torch.Tensor
    """bool [T, E]."""
    token_index: torch.Tensor
    """int64 [N]."""
    pair_index: torch.Tensor
    """int64 [N]: position of the pair in the flattened routing map."""
    slots: torch.Tensor
    """int64 [N], 0 .. V-1, on the first of the tp ranks."""
    spread: torch.Tensor
    """int64 [tp]: what leads from there to the same slot on each of them."""
    num_arriving: int
    """n, which this rank's slots get by the plan."""


class BackEnd(ABC):
    """How a manager of Megatron is told what goes where, and what arrives."""

    def __init__(self, most_slots: int):
        """Of a rank that never has more slots than these."""
        self.most_slots = most_slots

    @abstractmethod
    def count_slots(self, needed: int) -> int:
        """M + S where a plan needs so many."""

    @abstractmethod
    def address(self, manager: Any, to: Addresses, probs: torch.Tensor) -> torch.Tensor:
        """Tell the manager where tokens go; from probabilities [T, E], return what it sends."""

    @abstractmethod
    def arrive(
        self, manager: Any, tokens: torch.Tensor, rows_per_slot: torch.Tensor
    ) -> Placement | None:
        """The order of the rows of tokens [A, H] that arrived; None where they are rows by slot."""

    @abstractmethod
    def open(
        self, manager: Any, arrival: Placement | None, tokens: torch.Tensor, probs: torch.Tensor
    ) -> Rows:
        """What arrived, by slot."""

    @abstractmethod
    def close(self, manager: Any, arrival: Placement | None, rows: torch.Tensor) -> torch.Tensor:
        """Undo `open`, of rows [n, H]."""


class DeepEP(BackEnd):
    """Sends a token once to a rank, with the list of its slots there.

    Its buffer depends on the hidden size and the ranks alone.
    """

    def count_slots(self, needed: int) -> int:
        """As many as are needed."""
        return needed

    def address(self, manager: Any, to: Addresses, probs: torch.Tensor) -> torch.Tensor:
        """Slots of each token, int64 [T, K * tp], -1 where it has fewer; fp32 of the same shape."""
        tp = len(to.spread)
        slots = to.slots.new_full((to.routing_map.numel(),), -1)
        slots = slots.index_copy_(0, to.pair_index, to.slots).view(to.routing_map.shape)
        slots, experts = slots.topk(manager.router_topk // tp, dim=1)
        is_none = slots < 0
        weights = probs.view(to.routing_map.shape).gather(1, experts).masked_fill(is_none, 0.0)
        each = slots.unsqueeze(2) + to.spread
        manager.token_indices = each.masked_fill_(is_none.unsqueeze(2), -1).flatten(1)
        return weights.unsqueeze(2).expand(-1, -1, tp).flatten(1)

    def arrive(
        self, manager: Any, tokens: torch.Tensor, rows_per_slot: torch.Tensor
    ) -> Placement | None:
        """Rows by slot, then token; the kernel's counts, which are on the host, are the plan's."""
        assert manager.tokens_per_expert.tolist() == rows_per_slot.tolist(), (
            "other tokens arrived than the plan sends"
        )
        # As wide as it ever is: kernels are compiled for a width.
        shape = (len(tokens), self.most_slots + 1)
        is_here = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
        is_here = is_here.scatter_(1, self._list_places(manager), True)[:, :-1].contiguous()
        return place_tokens(is_here, np.array([[0], [int(rows_per_slot.sum())]]))

    def open(
        self, manager: Any, arrival: Placement | None, tokens: torch.Tensor, probs: torch.Tensor
    ) -> Rows:
        """From tokens [A, H] and probabilities fp32 [A, K * tp]."""
        assert arrival is not None
        dense = probs.new_zeros(len(tokens), self.most_slots + 1)
        dense = dense.scatter(1, self._list_places(manager), probs)[:, :-1]
        of_rows = dense.reshape(-1).index_select(0, arrival.pair_index)
        if manager.router_dtype == "fp64":
            of_rows = of_rows.double()
        return gather_rows(tokens, arrival), of_rows

    def close(self, manager: Any, arrival: Placement | None, rows: torch.Tensor) -> torch.Tensor:
        """Add the rows of each token: [A, H]."""
        assert arrival is not None
        return add_up(rows, arrival, len(manager.dispatched_indices))

    def _list_places(self, manager: Any) -> torch.Tensor:
        """int64 [A, K * tp]: slots of this rank, and one behind them all for those of others."""
        slots = manager.dispatched_indices
        return slots.masked_fill(slots < 0, self.most_slots)


class HybridEP(BackEnd):
    """Permutes as well: rows arrive by slot.

    Its buffer is made for so many experts a rank, and its kernels are compiled for them.
    """

    def count_slots(self, needed: int) -> int:
        """Always the same."""
        return self.most_slots

    def address(self, manager: Any, to: Addresses, probs: torch.Tensor) -> torch.Tensor:
        """A map, bool [T, V], and probabilities of that shape; padded as the model asks for."""
        T, V = len(to.routing_map), manager.num_experts
        cells = ((to.token_index * V + to.slots).unsqueeze(1) + to.spread).flatten()
        is_sent = torch.zeros(T * V, dtype=torch.bool, device=cells.device)
        weights = probs.reshape(-1).index_select(0, to.pair_index)
        weights = weights.unsqueeze(1).expand(-1, len(to.spread)).flatten()
        dense = weights.new_zeros(T * V).scatter(0, cells, weights)
        manager.setup_metadata(is_sent.index_fill_(0, cells, True).view(T, V), dense.view(T, V))
        manager.num_permuted_tokens = to.num_arriving  # else the host waits for it
        return manager.token_probs

    def arrive(
        self, manager: Any, tokens: torch.Tensor, rows_per_slot: torch.Tensor
    ) -> Placement | None:
        """Nothing is left to order."""
        return None

    def open(
        self, manager: Any, arrival: Placement | None, tokens: torch.Tensor, probs: torch.Tensor
    ) -> Rows:
        """They are rows [n, H] and fp32 [n]."""
        return tokens, probs

    def close(self, manager: Any, arrival: Placement | None, rows: torch.Tensor) -> torch.Tensor:
        """[n, H], as they are."""
        return rows


BACK_ENDS: dict[str, type[BackEnd]] = {"deepep": DeepEP, "hybridep": HybridEP}
"""By `--moe-flex-dispatcher-backend`."""
