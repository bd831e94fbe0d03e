"""Token dispatch over physical slots: Megatron's all-to-all dispatcher, with a plan.

Letters: T tokens of this rank, H hidden size, E experts, D replicas of each (1, unless tokens are
spread over replicas), P ranks that share the tokens, M = D * E / P native and S foreign slots a
rank, R = P * tp sources (expert-parallel major; tp is the expert-tensor-parallel size), N pairs.

The plan changes only which slot a (token, expert) pair goes to. With E experts replaced by
P * (M + S) slots, Megatron's own exchange, gather and combine work as they are, and where nothing
is lent its sort as well; what is overridden here is where the slots and split sizes come from.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.lending.ranges import step
from megatron_llep.placement import (
    Pairs,
    Placement,
    gather_rows,
    join_by_source,
    list_pairs,
    order_chunks,
    place_tokens,
    split_by_slot,
    sum_rows,
)
from megatron_llep.placement.counting import CountTable
from megatron_llep.planner import (
    Plan,
    Topology,
    load_per_rank,
    plan_over_replicas,
    receives,
    sends,
    slot_of_expert,
)
from megatron_llep.planner.cost.layer import get_layer_cost


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all ranks know, and have decided alike, before a layer's tokens move."""

    routing_map: torch.Tensor
    """bool [T, E], the routing that was counted."""
    pairs: Pairs
    """This rank's, listed while the counts travelled."""
    counts: np.ndarray
    """int64 [R, D * E], tokens from each source to each replica of each expert."""
    load_before: np.ndarray
    """int64 [P], tokens on each rank under plain expert parallelism."""
    plan: Plan
    """For D * E experts, M of them native to each rank."""
    trainers: np.ndarray
    """bool [R], which sources need gradients of their experts' weights."""
    plan_seconds: float

    @property
    def trains(self) -> bool:
        """Whether some rank does."""
        return bool(self.trainers.any())


class LLEPTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends tokens to the slots of a plan made from this micro-batch's counts."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        llep: LLEPConfig,
    ):
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        self.llep = llep
        self.num_native = num_local_experts
        if self.ep_size % (llep.ranks_per_node or 1):
            raise ValueError(
                f"--moe-llep-ranks-per-node {llep.ranks_per_node}: must divide the {self.ep_size} "
                "ranks that share tokens"
            )
        self.topology = Topology(
            ranks_per_node=llep.ranks_per_node, lend_across_nodes=llep.lend_to == "any_node"
        )
        # pg_collection.ep may be several expert-parallel groups joined, each with all E experts.
        self.num_replicas = self.ep_size * num_local_experts // self.num_experts
        # Megatron sorts what arrives where nothing is lent: chunks of M experts of R sources.
        chunks = torch.arange(self.ep_size * num_local_experts * self.tp_size)
        self.sort_input_by_local_experts = chunks.reshape(-1, num_local_experts).T.ravel()
        self.restore_output_by_local_experts = chunks.reshape(num_local_experts, -1).T.ravel()
        self.cost = get_layer_cost(config, llep)
        self.decision: Decision | None = None
        # From the router to `decide` of one forward.
        self._counting: tuple[CountTable, Pairs] | None = None
        # S of the last forward.
        self.num_foreign = 0
        # From dispatch to combine of one forward.
        self._placement: Placement | None = None

    @property
    def source(self) -> int:
        """This rank's index among the R sources."""
        return self.ep_rank * self.tp_size + self.tp_rank

    @step("count.start")
    def start_count(
        self, routing_map: torch.Tensor, *, trains: bool = True, lends: bool = True
    ) -> None:
        """Start gathering all ranks' counts; `decide`, given the same map, waits for them.

        Meanwhile the GPU does what needs no plan. All ranks call it in the same order.

        Args:
            routing_map: bool [T, E].
            trains: whether this rank's experts need weight gradients.
            lends: whether this rank agrees to lend; nothing is lent unless all do.
        """
        table = CountTable(
            routing_map,
            trains=trains,
            lends=lends,
            group=self.tp_ep_group,
            stream=self.cuda_dtoh_stream,
        )
        # As many as there are where no token is dropped and none has an expert twice.
        most = len(routing_map) * self.config.moe_router_topk
        self._counting = table, list_pairs(routing_map, most)

    def is_counting(self, routing_map: torch.Tensor) -> bool:
        """Whether `start_count` was given this map, and `decide` was not yet called."""
        return self._counting is not None and self._counting[0].routing_map is routing_map

    def decide(self, routing_map: torch.Tensor) -> Decision:
        """Plan from all ranks' counts, which are started first if they were not.

        Args:
            routing_map: bool [T, E].
        """
        if not self.is_counting(routing_map):
            self.start_count(routing_map)
        assert self._counting is not None
        (table, pairs), self._counting = self._counting, None
        with step("count.wait"):
            counted = table.wait()

        start = time.perf_counter()
        with step("plan"):
            plan, counts = plan_over_replicas(
                counted.counts,
                num_replicas=self.num_replicas,
                num_ranks=self.ep_size,
                planner=self.llep.planner,
                max_foreign=self.llep.max_foreign_experts if counted.lenders.all() else 0,
                capacity_factor=self.llep.capacity_factor,
                min_tokens_per_gemm=self.llep.min_tokens_per_gemm,
                imbalance_threshold=self.llep.imbalance_threshold,
                tolerance=self.llep.tolerance,
                topology=self.topology,
                cost=self.cost,
            )
        self.decision = Decision(
            routing_map=routing_map,
            pairs=pairs,
            counts=counts,
            load_before=load_per_rank(counted.counts, self.num_replicas, self.ep_size),
            plan=plan,
            trainers=counted.trainers,
            plan_seconds=time.perf_counter() - start,
        )
        return self.decision

    @step("place")
    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Order tokens by the slot they go to, and set the sizes of the exchange.

        Args:
            hidden_states: [..., H], T tokens.
            routing_map: bool [T, E].
            probs: [T, E].

        Returns:
            Tokens [N, H] and their probabilities [N], by physical slot.
        """
        decision = self.decision
        if decision is None or decision.routing_map is not routing_map:
            decision = self.decide(routing_map)
        self.decision = None  # used once: a recomputed forward decides again
        self.hidden_shape = hidden_states.shape
        self.probs = probs
        self.routing_map = routing_map
        hidden_states = hidden_states.view(-1, self.hidden_shape[-1])
        self.hidden_shape_before_permute = hidden_states.shape

        self.num_foreign = decision.plan.max_foreign
        num_slots = self.num_native + self.num_foreign
        to_ranks = sends(
            decision.plan,
            decision.counts,
            self.source,
            self.llep.token_assignment,
            self.topology,
        )
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states.view(self.hidden_shape))
        chunks = order_chunks(to_ranks, slot_of_expert(decision.plan), num_slots, self.num_replicas)
        self._placement = placement = place_tokens(routing_map, chunks, decision.pairs)
        self.reversed_local_input_permutation_mapping = placement.token_index
        rows = gather_rows(hidden_states, placement)
        probs = probs.reshape(-1).index_select(0, placement.pair_index)
        self._set_splits(decision, to_ranks)  # while the GPU gathers
        return rows, probs

    def sort_by_slot(
        self, tokens: torch.Tensor, probs: torch.Tensor, parts: Sequence[int]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """As `dispatch_postprocess`, in a tensor for each part of the slots.

        Args:
            tokens: [N, H], as they arrived.
            probs: [N].
            parts: how many slots each part has; M + S in all.

        Returns:
            Tokens [n, H] and probabilities [n] of each part, by slot, and int [M + S], the tokens
            of each slot, on the host.
        """
        if self.tp_size > 1:
            gather = partial(
                gather_from_sequence_parallel_region,
                group=self.tp_group,
                output_split_sizes=self.output_splits_tp.tolist(),
            )
            tokens, probs = gather(tokens), gather(probs)
        of_parts = (
            split_by_slot(each, self.num_global_tokens_per_local_expert, parts)
            for each in (tokens, probs)
        )
        return list(zip(*of_parts, strict=True)), self.tokens_per_expert

    def sort_by_source(self, outputs: Sequence[torch.Tensor], parts: Sequence[int]) -> torch.Tensor:
        """As `combine_preprocess`, of outputs [n, H] of the same parts: [N, H]."""
        hidden = join_by_source(outputs, self.num_global_tokens_per_local_expert, parts)
        if self.tp_size > 1:
            hidden = reduce_scatter_to_sequence_parallel_region(
                hidden.to(self.probs.dtype),
                group=self.tp_group,
                input_split_sizes=self.output_splits_tp.tolist(),
            ).to(hidden.dtype)
        return hidden

    def combine_postprocess(self, rows: torch.Tensor) -> torch.Tensor:
        """Add each token's rows, and the shared experts' output: [N, H] -> [..., H]."""
        placement, self._placement = self._placement, None
        assert placement is not None, "tokens are combined once, after they were dispatched"
        if placement.rows_by_token is None:
            return super().combine_postprocess(rows)
        output = sum_rows(rows, placement).view(self.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output

    def _set_splits(self, decision: Decision, to_ranks: np.ndarray) -> None:
        """Set the sizes of the parent's exchange and sort, all on the host."""
        from_sources = receives(
            decision.plan,
            decision.counts,
            self.ep_rank,
            self.llep.token_assignment,
            self.topology,
        )
        # [R, M+S] -> [tp, P, M+S]
        per_slot = from_sources.reshape(self.ep_size, self.tp_size, -1).transpose(1, 0, 2)
        per_rank = per_slot.sum(axis=2)
        self.input_splits = to_ranks.sum(axis=0)
        self.output_splits = per_rank[self.tp_rank]
        self.output_splits_tp = per_rank.sum(axis=1)
        self.num_global_tokens_per_local_expert = torch.from_numpy(
            per_slot.reshape(-1, self.num_native + self.num_foreign)
        )
        self.tokens_per_expert = torch.from_numpy(per_slot.sum(axis=(0, 1)))
