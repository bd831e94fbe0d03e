"""Tokens travel through a back end of Megatron's flex dispatcher, DeepEP or HybridEP.

Letters: T tokens of this rank, H hidden size, E experts, P ranks that share the tokens, tp the
expert-tensor-parallel size, R = P * tp ranks that exchange tokens, M native and S foreign slots a
rank, N pairs, A rows or tokens that arrive, n rows of a part of the slots, K experts of a token.

Megatron's manager of the back end sends tokens to R * (M + S) slots as it would to as many experts.
A forward has a manager of its own, a copy of the dispatcher's, which rides on the record: so S may
change with the plan, and several forwards may be open at once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

from megatron_llep.dispatcher import LLEPTokenDispatcher, Part
from megatron_llep.placement.chunks import to_device
from megatron_llep.placement.forward import Placed, hand_on
from megatron_llep.placement.pairs import Placement
from megatron_llep.travel.back_ends import BACK_ENDS, Addresses


@dataclass(frozen=True, kw_only=True, eq=False)
class Addressed(Placed):
    """What a forward knows besides, when its back end has been told where tokens go."""

    manager: Any
    """Megatron's, of this forward alone."""
    arrival: Placement | None = None
    """The order of rows, by slot, of tokens that arrived; None where rows arrive in it."""


class FlexDispatcher(LLEPTokenDispatcher, MoEFlexTokenDispatcher):
    """Megatron's flex dispatcher, with a plan."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.cuda_dtoh_stream = torch.cuda.Stream()
        most = self.llep.max_foreign_experts
        most_slots = self.num_native + (self.num_native if most is None else most)
        self.back_end = BACK_ENDS[self.config.moe_flex_dispatcher_backend](most_slots)

    def sort_by_slot(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor, parts: Sequence[int]
    ) -> list[Part]:
        """From what the manager received."""
        assert isinstance(placed, Addressed)
        rows, probs = self.back_end.open(placed.manager, placed.arrival, tokens, probs)
        if len(parts) == 1:
            return [(rows, probs)]
        sizes = placed.exchange.rows_of(parts)
        return list(zip(rows.split(sizes), probs.split(sizes), strict=True))

    def sort_by_source(self, placed: Placed, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make of outputs [n, H] of all parts what the manager sends back."""
        assert isinstance(placed, Addressed)
        rows = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))
        hidden = self.back_end.close(placed.manager, placed.arrival, rows)
        hand_on(placed, hidden)
        return hidden

    def _lay_out(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Placed, torch.Tensor, torch.Tensor]:
        """Tokens [T, H] as they are, and the probabilities of their slots."""
        slots_per_rank = self.back_end.count_slots(self.num_native + placed.plan.max_foreign)
        manager = copy.copy(self._comm_manager)
        manager.num_local_experts = slots_per_rank
        manager.num_experts = self.ep_size * self.tp_size * slots_per_rank
        addresses = Addresses(
            routing_map=placed.routing_map,
            token_index=placed.placement.token_index,
            pair_index=placed.placement.pair_index,
            slots=self._list_slots(placed, slots_per_rank),
            spread=torch.arange(self.tp_size, device=tokens.device) * slots_per_rank,
            num_arriving=int(placed.exchange.rows_per_slot.sum()),
        )
        probs = self.back_end.address(manager, addresses, probs)
        return Addressed(**vars(placed), manager=manager), tokens, probs

    def _list_slots(self, placed: Placed, slots_per_rank: int) -> torch.Tensor:
        """int64 [N]: of all R * (M + S), each pair's on the first of its holder's tp ranks.

        Without a host sync.
        """
        _, length, slot = placed.exchange.chunks
        rank, slot = np.divmod(slot, placed.exchange.rows_per_source.shape[1])
        slot = rank * self.tp_size * slots_per_rank + slot
        slot, length = to_device(np.stack((slot, length)), placed.exchange.device)
        num_pairs = len(placed.placement.pair_index)
        return slot.repeat_interleave(length, output_size=num_pairs)

    def _send(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Placed, torch.Tensor, torch.Tensor]:
        """Tokens [T, H] to all ranks with slots of theirs.

        The current stream waits for the back end's within Megatron's call: lending starts behind
        the tokens, and is hidden by what natives compute.
        """
        assert isinstance(placed, Addressed)
        manager = placed.manager
        manager.token_probs = probs  # where a schedule has cut the graph, of this side of the cut
        tokens = manager.dispatch(tokens, async_finish=True, allocate_on_comm_stream=True)
        if placed.meanwhile is not None:
            placed.meanwhile()
        self._start_shared(tokens)
        arrival = self.back_end.arrive(manager, tokens, placed.exchange.rows_per_slot)
        return replace(placed, arrival=arrival), tokens, manager.dispatched_probs

    def _send_back(self, placed: Placed, rows: torch.Tensor) -> torch.Tensor:
        """Each rank's sum for a token goes back, and these are added: [T, H]."""
        assert isinstance(placed, Addressed)
        return placed.manager.combine(rows, async_finish=True, allocate_on_comm_stream=True)

    def _add_up(self, placed: Placed, rows: torch.Tensor) -> torch.Tensor:
        """Tokens [T, H]: the back end has added them up."""
        return rows
