"""Token dispatch over physical slots: what all ways to travel share.

Letters: T tokens of this rank, H hidden size, E experts, D replicas of each (1, unless tokens are
spread over replicas), P ranks that share the tokens, M = D * E / P native and S foreign slots a
rank, R = P * tp sources (expert-parallel major; tp is the expert-tensor-parallel size), N pairs,
n rows of a part of the slots.

The plan changes only which slot a (token, expert) pair goes to: E experts become P * (M + S) slots.
Here it is made, and pairs are given their slots; a subclass (`travel`) knows how rows get there and
back, and is a dispatcher of Megatron's as well. Each step takes the record of its forward off the
tokens it is given and lets it ride on those it returns (`placement.forward`); the dispatcher itself
keeps settings only.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.lending.agreement import check_experts
from megatron_llep.lending.offer import Offer
from megatron_llep.lending.progress import Progress
from megatron_llep.lending.ranges import step
from megatron_llep.placement import list_pairs, place_tokens
from megatron_llep.placement.counting import CountTable, Foretold
from megatron_llep.placement.exchange import TokenExchange
from megatron_llep.placement.forward import (
    Ahead,
    Decision,
    Placed,
    Planned,
    Routed,
    find,
    hand_on,
    take,
)
from megatron_llep.placement.pairs import Pairs
from megatron_llep.planner import Topology, plan_over_replicas
from megatron_llep.planner.cost.layer import get_layer_cost, get_layer_shape

Part = tuple[torch.Tensor, torch.Tensor]
"""Rows [n, H] of some of the slots, by slot, and the router's weight of each [n]."""


class LLEPTokenDispatcher(MoETokenDispatcher):
    """Sends tokens to the slots of a plan made from this micro-batch's counts.

    A subclass names one of Megatron's dispatchers as its second base.
    """

    cuda_dtoh_stream: torch.cuda.Stream
    """On which counts come to the host; of Megatron's dispatcher, or of the subclass."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        llep: LLEPConfig,
        ranks_per_node: int | None = None,
        progress: Progress | None = None,
    ):
        # Of the dispatcher of Megatron's that the subclass names.
        of_megatron = (num_local_experts, local_expert_indices, config, pg_collection)
        super().__init__(*of_megatron)
        self.llep = llep
        self.num_native = num_local_experts
        ranks_per_node = llep.ranks_per_node or ranks_per_node
        if self.ep_size % (ranks_per_node or 1):
            raise ValueError(
                f"--moe-llep-ranks-per-node {ranks_per_node}: must divide the {self.ep_size} "
                "ranks that share tokens"
            )
        self.topology = Topology(
            ranks_per_node=ranks_per_node, lend_across_nodes=llep.lend_to == "any_node"
        )
        # pg_collection.ep may be several expert-parallel groups joined, each with all E experts.
        self.num_replicas = self.ep_size * num_local_experts // config.num_moe_experts
        self.cost = get_layer_cost(config, llep)
        self.prices = get_layer_shape(config, llep).prices
        self.progress = progress or Progress()
        self.compares_at_once = dist.get_backend(self.tp_ep_group) == "gloo"
        """Whether unlike plans are seen before tokens move, and not with the next counts. gloo's
        exchanges hold up the host: with other sizes on other ranks it would never come to count."""
        self.on_plan: list[Callable[[Planned], None]] = []
        """Called with each plan."""
        # For whoever calls Megatron's steps without the layer: see `dispatch_postprocess`.
        self._arrived: Placed | None = None

    @property
    def node_size(self) -> int:
        """Ranks on a node, of those that share tokens."""
        return self.topology.node_size(self.ep_size)

    @property
    def source(self) -> int:
        """This rank's index among the R sources."""
        return self.ep_rank * self.tp_size + self.tp_rank

    @step("count.start")
    def start_count(
        self,
        routing_map: torch.Tensor,
        offer: Offer | None = None,
        known_ahead: torch.Tensor | int = 0,
    ) -> Routed:
        """Start gathering all ranks' counts, for which `plan` waits; all ranks in the same order.

        Meanwhile the GPU does what needs no plan.

        Args:
            routing_map: bool [T, E].
            offer: what this rank has to lend; nothing is lent unless all ranks agree to.
            known_ahead: as for `CountTable`.
        """
        offer = offer or Offer()
        table = CountTable(
            routing_map,
            note=offer.note,
            mark=self.progress.mark,
            last_plan=self.progress.last_plan,
            known_ahead=known_ahead,
            group=self.tp_ep_group,
            stream=self.cuda_dtoh_stream,
        )
        pairs = self._list_pairs(routing_map)
        return Routed(routing_map=routing_map, table=table, pairs=pairs, offer=offer)

    @step("count.start")
    def skip_count(self, routing_map: torch.Tensor, ahead: Ahead) -> Routed:
        """In place of `start_count`, where the plan is there: nothing is gathered."""
        return Routed(
            routing_map=routing_map,
            table=None,
            pairs=self._list_pairs(routing_map),
            ahead=ahead,
            offer=ahead.offer,
        )

    def plan(self, routed: Routed) -> Planned:
        """Plan from all ranks' counts, if that is not done.

        Raises:
            ValueError: the ranks' experts cannot be lent to each other.
            RuntimeError: the ranks are in different forwards, their plans differ, or a rank's
                routers did not choose what it had foretold.
        """
        known_ahead, loan = 0, None
        if routed.ahead is not None:
            decision, loan = routed.ahead.decision, routed.ahead.loan
        else:
            assert routed.table is not None
            with step("count.wait"):
                counted = routed.table.wait()
            self.progress.check_marks(counted.marks, self.tp_ep_group)
            check_experts(
                counted.notes,
                routed.offer.experts,
                place=routed.place,
                tp_size=self.tp_size,
                group=self.tp_ep_group,
            )
            self.progress.check_plans(counted.last_plans, self.tp_ep_group)
            self.progress.check_foretold(counted.known_ahead, self.tp_ep_group)
            known_ahead = min(counted.known_ahead)
            decision = self.decide(counted)
        planned = Planned(**vars(routed), **vars(decision), known_ahead=known_ahead, loan=loan)
        for listener in self.on_plan:
            listener(planned)
        return planned

    def decide(self, counted: Foretold, place: str | None = None) -> Decision:
        """Plan from what every rank knows; all ranks in the same order.

        Args:
            counted: of all ranks, whose experts may be lent to each other.
            place: which layer, in words, if it runs later.

        Raises:
            RuntimeError: the ranks' plans differ.
        """
        start = time.perf_counter()
        with step("plan"):
            plan, counts = plan_over_replicas(
                counted.counts,
                num_replicas=self.num_replicas,
                num_ranks=self.ep_size,
                planner=self.llep.planner,
                max_foreign=self.llep.max_foreign_experts if counted.notes.lends else 0,
                capacity_factor=self.llep.capacity_factor,
                min_tokens_per_gemm=self.llep.min_tokens_per_gemm,
                imbalance_threshold=self.llep.imbalance_threshold,
                tolerance=self.llep.tolerance,
                topology=self.topology,
                prices=self.prices,
                cost=self.cost,
            )
        plan_seconds = time.perf_counter() - start
        self.progress.note_plan(plan, ahead_of=place)
        if self.compares_at_once:
            self.progress.compare_plans(self.tp_ep_group)
        return Decision(
            counts=counts, plan=plan, trains=counted.notes.trains, plan_seconds=plan_seconds
        )

    @step("place")
    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each pair its slot, and make ready what is sent.

        Args:
            hidden_states: [..., H], T tokens.
            routing_map: bool [T, E]; its counts and its plan may be there already.
            probs: [T, E].

        Returns:
            What `_lay_out` makes of tokens and probabilities.
        """
        if find(Routed, routing_map) is None:
            hand_on(self.start_count(routing_map), routing_map)
        if find(Planned, routing_map) is None:
            hand_on(self.plan(take(Routed, routing_map)), routing_map)
        planned = take(Planned, routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        exchange = TokenExchange.of(
            planned.plan,
            planned.counts,
            self.source,
            num_replicas=self.num_replicas,
            order=self.llep.token_assignment,
            topology=self.topology,
            device=hidden_states.device,
        )
        placed = Placed(
            **vars(planned),
            placement=place_tokens(routing_map, exchange.chunks, planned.pairs),
            hidden_shape=hidden_states.shape,
            probs_dtype=probs.dtype,
            exchange=exchange,
        )
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        placed, rows, probs = self._lay_out(placed, hidden_states, probs)
        hand_on(placed, rows)
        return rows, probs

    def token_dispatch(
        self, tokens: torch.Tensor, probs: torch.Tensor | None = None, *args: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send what `dispatch_preprocess` returned, and receive what others send.

        `Planned.meanwhile` runs when tokens are on their way; then, as Megatron has it, the first
        linear of overlapping shared experts.
        """
        placed = take(Placed, tokens)
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        assert probs is not None, "a layer hands on what dispatch_preprocess returned"
        placed, tokens, probs = self._send(placed, tokens, probs)
        hand_on(placed, tokens)
        return tokens, probs

    def dispatch_postprocess(
        self, tokens: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Megatron's step for its own layer: all slots together; LLEP's layer has `sort_by_slot`.

        No tensor leads from here to `combine_preprocess`, so only one forward at a time can be
        between these two.

        Returns:
            Tokens [N, H] by slot, int [M + S] tokens of each slot on the host, probabilities [N].
        """
        self._arrived = placed = take(Placed, tokens)
        per_slot = placed.exchange.rows_per_slot
        ((tokens, probs),) = self.sort_by_slot(placed, tokens, probs, (len(per_slot),))
        return tokens, per_slot, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undo `dispatch_postprocess`: from [N, H], by slot, to rows as they arrived."""
        placed, self._arrived = self._arrived, None
        assert placed is not None, "tokens are combined once, after they were dispatched"
        return self.sort_by_source(placed, [hidden_states])

    def token_combine(self, hidden_states: torch.Tensor, *args: bool) -> torch.Tensor:
        """Send rows back; overlapping shared experts run their second linear."""
        placed = take(Placed, hidden_states)
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        rows = self._send_back(placed, hidden_states)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(rows)
            self.shared_experts.post_forward_comm()
        hand_on(placed, rows)
        return rows

    def combine_postprocess(self, rows: torch.Tensor) -> torch.Tensor:
        """Each token's output [..., H], with that of overlapping shared experts."""
        placed = take(Placed, rows)
        output = self._add_up(placed, rows).view(placed.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output

    @abstractmethod
    def sort_by_slot(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor, parts: Sequence[int]
    ) -> list[Part]:
        """Sort what arrived by slot, into a tensor for each part of the slots.

        Args:
            placed: of this forward.
            tokens: as they arrived.
            probs: likewise.
            parts: how many slots each part has; M + S in all.
        """

    @abstractmethod
    def sort_by_source(self, placed: Placed, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make of the outputs [n, H] of all parts what is sent back."""

    @abstractmethod
    def _lay_out(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Placed, torch.Tensor, torch.Tensor]:
        """Make of tokens [T, H] and probabilities [T, E] what is sent."""

    @abstractmethod
    def _send(
        self, placed: Placed, tokens: torch.Tensor, probs: torch.Tensor
    ) -> tuple[Placed, torch.Tensor, torch.Tensor]:
        """Send, and call `_start_shared` and `Planned.meanwhile` when tokens are on their way."""

    @abstractmethod
    def _send_back(self, placed: Placed, rows: torch.Tensor) -> torch.Tensor:
        """Undo `_send`, of tokens."""

    @abstractmethod
    def _add_up(self, placed: Placed, rows: torch.Tensor) -> torch.Tensor:
        """Each token's sum [T, H] of what came back."""

    def _list_pairs(self, routing_map: torch.Tensor) -> Pairs:
        # As many as there are where no token is dropped and none has an expert twice.
        return list_pairs(routing_map, len(routing_map) * self.config.moe_router_topk)

    def _start_shared(self, tokens: torch.Tensor) -> None:
        """The first linear of overlapping shared experts, when these tokens are on their way."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(tokens)
