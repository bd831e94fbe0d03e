"""The MoE layer with LLEP: Megatron's `MoELayer`, with a plan between routing and dispatch.

Letters: T tokens of this rank, E experts, H hidden size, N (token, expert) pairs.

Megatron calls the steps in the order in which they stand here. Each hands the record of its forward
on to the next (`placement.forward`); the layer itself keeps settings only.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Concatenate

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.cuda_graphs import is_graph_capturing
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.ahead.model_chunk import ModelChunk
from megatron_llep.config import LLEPConfig
from megatron_llep.experts.base import LendableExperts
from megatron_llep.experts.grouped_mm import GroupedMM
from megatron_llep.experts.offering import Offering
from megatron_llep.experts.te_grouped import leave_fused_operations
from megatron_llep.integration.settings.notices import Notices
from megatron_llep.integration.settings.table import replace_settings
from megatron_llep.lending.lender import Lender, start_lending
from megatron_llep.lending.loan import WeightLoan
from megatron_llep.lending.nodes import (
    add_returned,
    hold_grads,
    lend,
    put_off,
    refetch,
    relay,
    settle,
)
from megatron_llep.lending.offer import Offer
from megatron_llep.lending.progress import is_in_backward, name_layer
from megatron_llep.lending.ranges import step
from megatron_llep.lending.shared import SharedLending
from megatron_llep.metrics import number_in_model, record_exchange, record_plan
from megatron_llep.observe.recording_info import make_info
from megatron_llep.placement.forward import (
    Decision,
    Placed,
    Planned,
    Routed,
    find,
    hand_on,
    read,
    take,
)
from megatron_llep.travel.kinds import make_dispatcher
from megatron_llep.validation import check_config, check_layer


def _tells_place[**P, R](
    method: Callable[Concatenate["LLEPMoELayer", P], R],
) -> Callable[Concatenate["LLEPMoELayer", P], R]:
    """Let an error from within a step say which layer and micro-batch it was.

    Each step by itself, as a schedule may run them one by one.
    """

    @wraps(method)
    def run(self: "LLEPMoELayer", *args: P.args, **kwargs: P.kwargs) -> R:
        with self.shared_lending.progress.told_in_errors():
            return method(self, *args, **kwargs)

    return run


class LLEPMoELayer(MoELayer):
    """An MoE layer that lends hot experts to idle ranks. Parameters and routing are Megatron's."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        llep: LLEPConfig,
        shared: SharedLending,
        notices: Notices | None = None,
    ):
        check_config(config, llep)
        notices = notices or Notices()
        # Before Megatron builds a dispatcher to no purpose.
        notices.add(replace_settings(config, llep.dispatcher))
        notices.tell()
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        check_layer(self, llep)
        self._start_llep(llep, shared, pg_collection)

    @classmethod
    def convert(
        cls,
        layer: MoELayer,
        *,
        llep: LLEPConfig,
        shared: SharedLending,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Turn a built `MoELayer` into this class, in place: same parameters, same module.

        The caller has checked it, prepared its groups, and replaced settings of its configuration.
        """
        assert type(layer) is MoELayer, "the behaviour of a subclass would be lost"
        layer.__class__ = cls
        layer._start_llep(llep, shared, pg_collection)

    def _start_llep(
        self, llep: LLEPConfig, shared: SharedLending, pg_collection: ProcessGroupCollection
    ) -> None:
        groups = shared.groups_of(pg_collection)
        if llep.expert_gemm == "grouped_mm":
            GroupedMM.convert(self.experts)
        leave_fused_operations(self.experts)
        self.llep = llep
        self._offering = Offering(self.experts)
        self.model_chunk: ModelChunk | None = None
        """The layers that run with this one, if their routing may be known before."""
        self.shared_lending = shared
        self.lending_group = groups.lending
        self.token_dispatcher = make_dispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            self.config,
            groups.tokens,
            llep=llep,
            ranks_per_node=groups.ranks_per_node,
            progress=shared.progress,
        )
        self._lender = Lender(
            self.config,
            llep,
            node_size=self.token_dispatcher.node_size,
            group=groups.lending,
            shared=shared,
            note_bytes=lambda sent, received: self._note_bytes(sent, received),
        )
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        self._experts_are_reduced = pg_collection.expt_dp.size() > 1
        # Whether a schedule may run the steps' backward one by one: see `lending.nodes`.
        self._is_cut = self.config.overlap_moe_expert_parallel_comm
        # Between a backward and its `backward_dw`, which follows before the layer's next backward.
        self._put_off: deque[WeightLoan] = deque()
        self._recorder = shared.recorder if self.token_dispatcher.source == 0 else None
        if self._recorder is not None:
            info = make_info(self.config, llep, pg_collection, groups.ranks_per_node)
            self._recorder.open(info, pg_collection)

    @property
    def lendable(self) -> LendableExperts:
        """The experts, as they can be lent."""
        return self._offering.lendable

    def shared_experts_compute(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Put shared experts off until counts travel: see `route`.

        Not where a graph captures them, or a schedule asks for their output.
        """
        at_once = self._is_cut or is_graph_capturing()
        return super().shared_experts_compute(hidden_states) if at_once else None

    @_tells_place
    def route(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts by Megatron's router, start counting, compute shared experts meanwhile.

        Megatron computes these before it routes. The GPU has work, then, while the host plans.

        Args:
            hidden_states: [..., H], T tokens.
            padding_mask: as for `MoELayer.route`.

        Returns:
            Probabilities [T, E] and the routing map, bool [T, E]. When a CUDA graph is replayed,
            both are its outputs, and Megatron's router and shared experts only hand them out.
        """
        if is_graph_capturing():
            super().route(hidden_states, padding_mask)  # raises what ends the graph here
            raise ValueError(
                f"--cuda-graph-modules: a graph would hold the experts of layer "
                f"{self.layer_number}, and plans are made on the host; use --cuda-graph-impl "
                "transformer_engine, or none"
            )
        place = self._enter_forward()
        # Its node is older than the router's, so gradients of the layer's input still add up in
        # Megatron's order, to the same bits.
        shared_input = hidden_states.view_as(hidden_states)
        probs, routing_map = super().route(hidden_states, padding_mask)
        if find(Routed, routing_map) is not None:  # the router gave this very tensor before
            routing_map = routing_map.clone()
        chunk = self.model_chunk
        if chunk is not None:
            routed = chunk.start_count(self, routing_map)
        else:
            routed = self._start_count(routing_map)
        routed = replace(routed, place=place)
        shared_output = None if self._is_cut else super().shared_experts_compute(shared_input)
        hand_on(replace(routed, shared_output=shared_output), routing_map)
        return probs, routing_map

    @_tells_place
    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Plan, and order the tokens for dispatch.

        Lending starts when tokens are on their way, unless it started while the layer before ran.
        Where a schedule cuts the layer another micro-batch's backward comes before that: there it
        starts at once, not to wait for it.

        Args:
            hidden_states: [..., H], T tokens.
            probs: [T, E].
            routing_map: bool [T, E].

        Returns:
            What the dispatcher sends, of tokens and of probabilities.
        """
        if find(Routed, routing_map) is None:
            hand_on(self._start_count(routing_map), routing_map)
        planned = self.token_dispatcher.plan(take(Routed, routing_map))
        start: Callable[[], None] | None = None
        if planned.loan is not None:
            planned.loan.attend(refetch=self._lender.refetches())
        elif not planned.plan.is_fallback:
            loan = self.make_loan(planned, planned.offer)
            start = partial(start_lending, planned.offer, loan)
            planned = replace(planned, loan=loan, meanwhile=None if self._is_cut else start)
        if self.model_chunk is not None:
            meanwhile = self.model_chunk.go_ahead(self, planned.known_ahead, planned.meanwhile)
            planned = replace(planned, meanwhile=meanwhile)
        if not self._is_cut:
            hidden_states = self._hold_grads(planned, hidden_states)
        hand_on(planned, routing_map)
        rows, probs = super().preprocess(hidden_states, probs, routing_map)
        if self._is_cut and start is not None:
            start()
        return rows, probs

    @_tells_place
    def dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `MoELayer.dispatch`, and starts lending while tokens travel.

        Notes what was planned as well, which nothing has to wait for by then.
        """
        with step("dispatch"):
            tokens, probs = super().dispatch(hidden_states, probs)
        placed = read(Placed, tokens)
        if placed.loan is not None and not self._is_cut:
            relay(placed.loan, hidden_states)
        self._record(placed)
        return tokens, probs

    @_tells_place
    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Run native and foreign experts on the tokens that arrived, as `MoELayer` does."""
        placed = take(Placed, hidden_states)
        loan, dispatcher = placed.loan, self.token_dispatcher
        if self._is_cut:
            hidden_states = self._hold_grads(placed, hidden_states)
        parts: tuple[int, ...] = (dispatcher.num_native,)
        if loan is not None:
            loan.continue_fetch()
            parts += (placed.plan.max_foreign,)
        rows = dispatcher.sort_by_slot(placed, hidden_states, probs, parts)
        per_slot = placed.exchange.rows_per_slot
        with step("experts"):
            if loan is None:
                ((hidden_states, probs),) = rows
                outputs = [self.experts(hidden_states, per_slot, probs)[0]]
            else:
                outputs = self.lendable.compute(rows, per_slot, partial(lend, loan))
                settle(loan, outputs)
        return dispatcher.sort_by_source(placed, outputs), None

    @_tells_place
    def combine(self, output: torch.Tensor) -> torch.Tensor:
        """As `MoELayer.combine`."""
        with step("combine"):
            output = super().combine(output)
        if self.model_chunk is not None:
            self.model_chunk.continue_next(self)
        loan = read(Placed, output).loan
        if loan is not None:
            refetch(loan, output)
        return output

    @_tells_place
    def postprocess(
        self, output: torch.Tensor, shared_expert_output: torch.Tensor | None
    ) -> torch.Tensor:
        """As `MoELayer.postprocess`, with the shared experts' output of `route` if it has one."""
        placed = read(Placed, output)
        if not self._is_cut:
            assert shared_expert_output is None, "shared experts are computed in route"
            shared_expert_output = placed.shared_output
        output = super().postprocess(output, shared_expert_output)
        if output.requires_grad:
            progress, place = self.shared_lending.progress, placed.place
            output.register_hook(lambda _: progress.enter(f"backward of {place}"))
        return output

    def backward_dw(self, routed_experts: bool = True, shared_experts: bool = False) -> None:
        """As `MoELayer.backward_dw`; what was lent comes home before native weights' hooks run."""
        if not (routed_experts and self._put_off):
            super().backward_dw(routed_experts, shared_experts)
            return
        with self.lendable.hooks_held():
            super().backward_dw(routed_experts, shared_experts)
            # Not before: the first micro-batch's gradients may be written over `main_grad`.
            add_returned(self._put_off.popleft())

    def _hold_grads(self, planned: Planned, hidden_states: torch.Tensor) -> torch.Tensor:
        """Keep the native weights' hooks from running before returned gradients are added."""
        loan = planned.loan
        if self.lendable.delays_weight_grads:
            return hidden_states if loan is None else put_off(loan, hidden_states, self._put_off)
        if loan is None and not (self._experts_are_reduced and planned.trains):
            return hidden_states
        natives = planned.offer.natives
        return hold_grads(loan, natives, hidden_states, hold_all=self._experts_are_reduced)

    def _enter_forward(self) -> str:
        return self.shared_lending.progress.enter_forward(
            self.layer_number or 0,  # of none that Megatron numbered
            is_mtp=self.is_mtp_layer,
            training=self.training,
            recorded=torch.is_grad_enabled(),
            again=is_in_backward(),
        )

    def make_offer(self) -> Offer:
        """What this rank has to lend of the layer's experts, as they are now."""
        lends = self.shared_lending.lends
        return self._offering.make_offer(self.experts, self.in_words(), lends=lends)

    def make_loan(self, decision: Decision, offer: Offer) -> WeightLoan:
        """Of what a plan lends, of what this rank has to lend."""
        return self._lender.make_loan(decision.plan, offer, decision.trains)

    def in_words(self) -> str:
        """Which layer it is."""
        return name_layer(self.layer_number or 0, self.is_mtp_layer)

    def _start_count(self, routing_map: torch.Tensor) -> Routed:
        return self.token_dispatcher.start_count(routing_map, self.make_offer())

    def _note_bytes(self, sent: int, received: int) -> None:
        if self.training:
            record_exchange(
                sent,
                received,
                layer_number=self.layer_number,
                is_mtp_layer=self.is_mtp_layer,
                config=self.config,
                group=self.lending_group,
            )

    def _record(self, placed: Planned) -> None:
        foreign_bytes = self.shared_lending.memory.take_peak()  # each forward its own
        # Megatron's own rule for router metrics: a recomputed layer then counts once.
        if self.training and torch.is_grad_enabled():
            record_plan(
                placed.plan,
                placed.load_before,
                layer_number=self.layer_number,
                is_mtp_layer=self.is_mtp_layer,
                config=self.config,
                expert_bytes=self.lendable.expert_bytes,
                foreign_bytes=foreign_bytes,
                plan_seconds=placed.plan_seconds,
                expert_tokens=placed.expert_tokens,
            )
            if self._recorder is not None:
                number = number_in_model(self.layer_number, self.is_mtp_layer, self.config)
                self._recorder.add(number, placed.counts, placed.plan)
