"""The MoE layer with LLEP: Megatron's `MoELayer`, with a plan between routing and dispatch.

Letters: T tokens of this rank, E experts, H hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.dispatcher import Decision, LLEPTokenDispatcher
from megatron_llep.experts import GroupedMM, make_lendable
from megatron_llep.experts.unchanged import UnchangedExperts
from megatron_llep.lending.loan import WeightLoan
from megatron_llep.lending.nodes import gate, lend, recall, relay, settle
from megatron_llep.lending.packing import Weights
from megatron_llep.lending.ranges import step
from megatron_llep.lending.shared import SharedLending
from megatron_llep.metrics import record_exchange, record_plan
from megatron_llep.validation import check_config, check_layer


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
    ):
        check_config(config, llep)  # before Megatron builds a dispatcher that is refused
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

        The caller has checked it, and prepared its groups.
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
        self.llep = llep
        self.lendable = make_lendable(self.experts)
        self.unchanged_experts = UnchangedExperts(self.experts)
        self.shared_lending = shared
        self.lending_group = groups.lending
        self.token_dispatcher = LLEPTokenDispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            self.config,
            groups.tokens,
            llep=llep,
        )
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        self._experts_are_reduced = pg_collection.expt_dp.size() > 1
        # What the host reads off the experts while counts travel: from route to preprocess.
        self._natives: list[Weights] = []
        self._parameter_hooks: list[Callable[[], object]] = []
        # Of shared experts that do not overlap: up to route, and from there to postprocess.
        self._shared_input: torch.Tensor | None = None
        self._shared_output: torch.Tensor | None = None
        # From preprocess to dispatch, and to combine.
        self._decision: Decision | None = None
        self._loan: WeightLoan | None = None
        self._micro_batches = 0

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `MoELayer.forward`; an error from within says which layer and micro-batch it was."""
        progress, place = self.shared_lending.progress, self._count_forward()
        progress.enter(f"forward of {place}")
        with progress.told_in_errors():
            self.unchanged_experts.check(self.experts)
            outputs = super().forward(hidden_states, *args, **kwargs)
        if outputs[0].requires_grad:
            outputs[0].register_hook(lambda _: progress.enter(f"backward of {place}"))
        return outputs

    def shared_experts_compute(self, hidden_states: torch.Tensor) -> None:
        """Put shared experts off until counts travel: the GPU has work while the host plans.

        Megatron computes them before it routes. Gradients of the layer's input still add up in that
        order, to the same bits, as the node of this view is older than the router's.
        """
        self._shared_input = hidden_states.view_as(hidden_states)

    def route(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts by Megatron's router, start counting, compute shared experts meanwhile.

        Args:
            hidden_states: [..., H], T tokens.
            padding_mask: as for `MoELayer.route`.

        Returns:
            Probabilities [T, E] and the routing map, bool [T, E].
        """
        probs, routing_map = super().route(hidden_states, padding_mask)
        self._start_count(routing_map)
        if self._shared_input is not None:
            self._shared_output = super().shared_experts_compute(self._shared_input)
            self._shared_input = None
        return probs, routing_map

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Plan, start lending, and order the tokens for dispatch.

        Args:
            hidden_states: [..., H], T tokens.
            probs: [T, E].
            routing_map: bool [T, E].
        """
        if not self.token_dispatcher.is_counting(routing_map):
            self._start_count(routing_map)
        self._decision = decision = self.token_dispatcher.decide(routing_map)
        self.lendable.check_trainers(decision.trainers)
        natives, self._natives = self._natives, []
        parameter_hooks, self._parameter_hooks = self._parameter_hooks, []
        self._loan = None
        if not decision.plan.is_fallback:
            for wait in parameter_hooks:
                wait()
            self._loan = WeightLoan(
                decision.plan,
                natives,
                group=self.lending_group,
                scatter_from=self.llep.scatter_from,
                grad_dtype=self._grad_dtype(),
                returns=decision.trains,
                refetch=self._refetches(),
                memory=self.shared_lending.memory,
                stream=self.shared_lending.stream_on(natives[0][0].device),
                progress=self.shared_lending.progress,
                note_bytes=self._note_bytes,
            )
            self._loan.start_fetch()
        if self._loan is not None or (self._experts_are_reduced and decision.trains):
            hidden_states = gate(
                self._loan, natives, hidden_states, hold_all=self._experts_are_reduced
            )
        hidden_states, probs = super().preprocess(hidden_states, probs, routing_map)
        if self._loan is not None:
            hidden_states = relay(self._loan, hidden_states)
        return hidden_states, probs

    def dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `MoELayer.dispatch`; notes what was decided, which nothing has to wait for now."""
        with step("dispatch"):
            dispatched = super().dispatch(hidden_states, probs)
        decision, self._decision = self._decision, None
        if decision is not None:
            self._record(decision)
        return dispatched

    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Run native and foreign experts on the tokens that arrived."""
        loan = self._loan
        if loan is None:
            with step("experts"):
                return super().routed_experts_compute(hidden_states, probs)
        loan.continue_fetch()
        parts = self.lendable.parts(self.token_dispatcher.num_foreign)
        rows, tokens_per_slot = self.token_dispatcher.sort_by_slot(hidden_states, probs, parts)
        with step("experts"):
            outputs = self.lendable.compute(rows, tokens_per_slot, partial(lend, loan))
        return self.token_dispatcher.sort_by_source(settle(loan, outputs), parts), None

    def combine(self, output: torch.Tensor) -> torch.Tensor:
        """As `MoELayer.combine`."""
        loan, self._loan = self._loan, None
        with step("combine"):
            output = super().combine(output)
        return output if loan is None else recall(loan, output)

    def postprocess(
        self, output: torch.Tensor, shared_expert_output: torch.Tensor | None
    ) -> torch.Tensor:
        """As `MoELayer.postprocess`, with the shared experts' output of `route`."""
        assert shared_expert_output is None, "shared experts are computed in route"
        shared_expert_output, self._shared_output = self._shared_output, None
        return super().postprocess(output, shared_expert_output)

    def _start_count(self, routing_map: torch.Tensor) -> None:
        """Start counting; meanwhile the host does what needs no plan."""
        self.token_dispatcher.start_count(
            routing_map, trains=self.lendable.trains(), lends=self.shared_lending.lends
        )
        self._natives = self.lendable.weights()
        self._parameter_hooks = self.lendable.parameter_hooks()

    def _count_forward(self) -> str:
        """This forward, in words; a recomputed one is not counted again."""
        kind = "MTP layer" if self.is_mtp_layer else "layer"
        if not self.training:
            return f"{kind} {self.layer_number}, evaluation"
        if not (is_checkpointing() and torch.is_grad_enabled()):
            self._micro_batches += 1
        return f"{kind} {self.layer_number}, micro-batch {self._micro_batches} since the start"

    def _grad_dtype(self) -> torch.dtype:
        if self.llep.grad_dtype == "fp32":
            # Not for fp64 parameters, whose gradients must not lose digits on the way.
            return torch.promote_types(torch.float32, self.lendable.dtype)
        return self.lendable.dtype

    def _refetches(self) -> bool:
        """Whether foreign weights are freed between forward and backward."""
        if is_checkpointing():  # backward follows at once, or this forward is not kept at all
            return False
        in_pipeline = self.config.pipeline_model_parallel_size > 1
        choice = self.llep.foreign_weights or ("refetch" if in_pipeline else "keep")
        return choice == "refetch"

    def _note_bytes(self, sent: int, received: int) -> None:
        record_exchange(
            sent,
            received,
            layer_number=self.layer_number,
            is_mtp_layer=self.is_mtp_layer,
            config=self.config,
            group=self.lending_group,
        )

    def _record(self, decision: Decision) -> None:
        # Megatron's own rule for router metrics: a recomputed layer then counts once.
        if self.training and torch.is_grad_enabled():
            record_plan(
                decision.plan,
                decision.load_before,
                layer_number=self.layer_number,
                is_mtp_layer=self.is_mtp_layer,
                config=self.config,
                expert_bytes=self.lendable.expert_bytes,
                foreign_bytes=self.shared_lending.memory.take_peak(),
                plan_seconds=decision.plan_seconds,
            )
