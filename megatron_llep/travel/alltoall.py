"""Tokens travel in Megatron's all-to-all, a row for each (token, expert) pair.

Letters: T tokens of this rank, H hidden size, P ranks that share the tokens, M native and S foreign
slots a rank, N pairs, n rows of a part of the slots; tp is the expert-tensor-parallel size.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_llep.dispatcher import LLEPTokenDispatcher, Part
from megatron_llep.placement import gather_rows, join_by_source, split_by_slot
from megatron_llep.placement.exchange import TokenExchange
from megatron_llep.placement.forward import Placed, hand_on
from megatron_llep.travel.exchange_rows import exchange_rows
from megatron_llep.travel.sums import add_up


class AlltoallDispatcher(LLEPTokenDispatcher, MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher, with a plan."""

    def sort_by_slot(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor, parts: Sequence[int]
    ) -> list[Part]:
        """From tokens [N, H] and probabilities [N], as they arrived."""
        if self.tp_size > 1:
            gather = partial(
                gather_from_sequence_parallel_region,
                group=self.tp_group,
                output_split_sizes=placed.exchange.gathered,
            )
            tokens, probs = gather(tokens), gather(probs)
        by_slot, sizes = placed.exchange.by_slot, placed.exchange.rows_of(parts)
        of_parts = (split_by_slot(each, by_slot, sizes) for each in (tokens, probs))
        return list(zip(*of_parts, strict=True))

    def sort_by_source(self, placed: Placed, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put outputs [n, H] of all parts back in the order of arrival: [N, H]."""
        hidden = join_by_source(outputs, placed.exchange.by_slot)
        if self.tp_size > 1:
            hidden = reduce_scatter_to_sequence_parallel_region(
                hidden.to(placed.probs_dtype),
                group=self.tp_group,
                input_split_sizes=placed.exchange.gathered,
            ).to(hidden.dtype)
        hand_on(placed, hidden)
        return hidden

    def _lay_out(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Placed, torch.Tensor, torch.Tensor]:
        """Rows [N, H] and their probabilities [N], by physical slot."""
        rows = gather_rows(tokens, placed.placement)
        return placed, rows, probs.reshape(-1).index_select(0, placed.placement.pair_index)

    def _send(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Placed, torch.Tensor, torch.Tensor]:
        """Exchange rows [N, H] and probabilities [N] between the P ranks."""
        tokens = self._exchange(tokens, placed.exchange, meanwhile=placed.meanwhile)
        self._start_shared(tokens)
        return placed, tokens, self._exchange(probs, placed.exchange)

    def _send_back(self, placed: Placed, rows: torch.Tensor) -> torch.Tensor:
        """Exchange rows [N, H] back."""
        return self._exchange(rows, placed.exchange, back=True)

    def _add_up(self, placed: Placed, rows: torch.Tensor) -> torch.Tensor:
        """Add each token's rows: [N, H] -> [T, H]."""
        if self.config.overlap_moe_expert_parallel_comm:
            placed.placement.keep_for_current_stream()
        return add_up(rows, placed.placement, placed.hidden_shape[:-1].numel())

    def _exchange(
        self,
        rows: torch.Tensor,
        sizes: TokenExchange,
        *,
        back: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Exchange rows [n, ...] between the P ranks, there or back; `meanwhile` while they go."""
        into, out_of = (sizes.sent, sizes.received) if back else (sizes.received, sizes.sent)
        run = all_to_all if meanwhile is None else partial(exchange_rows, meanwhile)
        return run(self.ep_group, rows, into, out_of, use_nccl_stream=self.use_nccl_stream)
