"""Megatron's own MoE layer, with a router that chooses as a workload says, and experts placed.

Letters: T tokens of this rank, E experts, K experts of a token, M slots of a rank (of E / P experts
at home, and of replicas), S = P * M slots of all ranks, H hidden size.
"""

import copy
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from benchmarks.imbalance.data import LayerSizes, make_expert, make_router

_LOWERED_BY = 1e4
"""Of logits: so far that they get no weight at all, even of a softmax over all experts."""


class WorkloadRouter(TopKRouter):
    """Megatron's router; experts that a token must not choose have their logits lowered.

    The others' stay, so weights of pairs are natural and gradients reach the router.
    """

    lowered: torch.Tensor | None = None
    """[T, E]."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [T, 1, E]."""
        assert self.lowered is not None, "follow a routing first"
        return super().gating(input) - self.lowered[:, None, :]

    def follow(self, routing_map: torch.Tensor) -> None:
        """Choose as in the map, bool [T, E], from now on."""
        self.lowered = (~routing_map).float() * _LOWERED_BY


class PlacedMoELayer(MoELayer):
    """Experts in slots of any rank, more than one for some: as EPLB places them.

    Megatron's dispatcher and experts know slots only. A rank's tokens of an expert take its
    replicas in turn.
    """

    def place(self, slots: np.ndarray) -> None:
        """Let slots hold these experts, int64 [S], from now on; weights are the caller's."""
        self.slots = slots
        experts, replicas = np.unique(slots, return_counts=True)
        table = np.zeros((len(experts), replicas.max()), dtype=np.int64)
        for expert in experts:
            table[expert, : replicas[expert]] = np.flatnonzero(slots == expert)
        device = self.get_parameter("router.weight").device
        self._slots_of = torch.from_numpy(table).to(device)
        self._replicas = torch.from_numpy(replicas).to(device)

    def route(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice of slots, [T, S] and bool [T, S]."""
        return self.to_slots(*super().route(hidden_states, padding_mask))

    def to_slots(
        self, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From experts [T, E] to slots [T, S]."""
        T = len(routing_map)
        # [T, K]; on a GPU the host does not have to wait for how many there are.
        expert = routing_map.float().topk(self.config.moe_router_topk, dim=1).indices
        token = torch.arange(T, device=expert.device).unsqueeze(1).expand_as(expert)
        turn = routing_map.cumsum(0)[token, expert] - 1 + self.ep_group.rank()
        slot = self._slots_of[expert, turn % self._replicas[expert]]
        of_slots = probs.new_zeros(T, len(self.slots))
        chosen = torch.zeros_like(of_slots, dtype=torch.bool)
        chosen[token, slot] = True
        return of_slots.index_put((token, slot), probs[token, expert]), chosen

    def count_slots(self, counts: np.ndarray) -> np.ndarray:
        """Pairs int64 [E, P] that each rank computes of each expert, of counts [P, E]."""
        (P, E), M = counts.shape, len(self.slots) // counts.shape[0]
        quota = np.zeros((E, P), dtype=np.int64)
        for expert in range(E):
            slots = np.flatnonzero(self.slots == expert)
            for rank in range(P):
                turns = (np.arange(counts[rank, expert]) + rank) % len(slots)
                np.add.at(quota[expert], slots[turns] // M, 1)
        return quota

    def add_up_replicas(self, name: str) -> None:
        """Let all replicas of an expert have the sum of their gradients, as `param.<name>`."""
        P, M = self.ep_group.size(), self.num_local_experts
        experts, replicas = np.unique(self.slots, return_counts=True)
        several = experts[replicas > 1]
        if not len(several):
            return
        own = self.slots.reshape(P, M)[self.ep_group.rank()]
        held = [
            (int(np.flatnonzero(several == expert)[0]), list(module.parameters()))
            for expert, module in zip(own, self.experts.local_experts, strict=True)
            if expert in several
        ]
        sizes = [weight.numel() for weight in self.experts.local_experts[0].parameters()]
        sums = torch.zeros(
            len(several), sum(sizes), device=self.get_parameter("router.weight").device
        )
        for row, weights in held:
            sums[row] += torch.cat([getattr(each, name).flatten() for each in weights])
        dist.all_reduce(sums, group=self.ep_group)
        for row, weights in held:
            for weight, part in zip(weights, sums[row].split(sizes), strict=True):
                getattr(weight, name).copy_(part.view_as(weight))


def build_layer(sizes: LayerSizes, seed: int, slots: np.ndarray | None = None) -> MoELayer:
    """A layer with the weights of `data`; with slots int64 [S] a `PlacedMoELayer`.

    Activations are not fused: nothing has to be compiled.
    """
    P, E = sizes.num_ranks, sizes.num_experts
    in_slots = np.arange(E) if slots is None else slots
    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        num_attention_heads=8,
        num_moe_experts=len(in_slots),
        moe_ffn_hidden_size=sizes.ffn,
        moe_router_topk=sizes.top_k,
        # Megatron asks for it there; what is lowered has no weight, so it makes no difference.
        moe_router_pre_softmax=sizes.top_k == 1,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=P,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        add_bias_linear=False,
        params_dtype=torch.float32,
    )
    of_megatron = get_moe_module_spec(use_te=False, num_experts=len(in_slots))
    submodules = MoESubmodules(
        experts=of_megatron.keywords["submodules"].experts,
        router=partial(_build_router, E),
    )
    kind = MoELayer if slots is None else PlacedMoELayer
    layer = kind(config=config, submodules=submodules)
    layer.set_layer_number(1)
    if torch.cuda.is_available():
        layer.cuda()
    if isinstance(layer, PlacedMoELayer):
        layer.place(in_slots)
    set_weights(layer, in_slots, sizes, seed)
    return layer


def set_weights(layer: MoELayer, slots: np.ndarray, sizes: LayerSizes, seed: int) -> None:
    """Give the router, and each slot of this rank, the weights that `data` makes."""
    layer.get_parameter("router.weight").data.copy_(make_router(sizes, seed))
    own = slots.reshape(sizes.num_ranks, -1)[layer.ep_group.rank()]
    for expert, module in zip(own.tolist(), layer.experts.local_experts, strict=True):
        linears = (module.linear_fc1, module.linear_fc2)
        for linear, weight in zip(linears, make_expert(sizes, expert, seed), strict=True):
            linear.weight.data.copy_(weight)


def _build_router(num_experts: int, *, config: TransformerConfig, **options) -> WorkloadRouter:
    """A router of E experts, however many slots there are."""
    config = copy.copy(config)
    config.num_moe_experts = num_experts
    return WorkloadRouter(config=config, **options)
