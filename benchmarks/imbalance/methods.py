"""The methods that are compared: how a layer is built that uses one, and what it moves.

Letters: P ranks, E experts, M experts at home on a rank, N slots of a rank, S = P * N of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from megatron.core.transformer.moe.moe_layer import MoELayer

from benchmarks.imbalance.data import LayerSizes
from benchmarks.imbalance.layer import PlacedMoELayer, build_layer
from benchmarks.imbalance.names import EPLB, FORCED, PLAIN, REPLICATED
from benchmarks.imbalance.workloads import Routing
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.offline.simulator.eplb import place_replicas
from megatron_llep.planner import Plan

SPARE_SLOTS = 1
"""Slots of a rank that EPLB has for replicas."""


@dataclass(kw_only=True, eq=False)
class Subject:
    """A layer that uses a method."""

    method: str
    layer: MoELayer
    sizes: LayerSizes
    slots: np.ndarray | None = None
    """Experts int64 [S] whose weights slots were given; None: each expert is at home."""
    plans: list[Plan] = field(default_factory=list)
    """The last one, of LLEP."""

    @property
    def is_even(self) -> bool:
        """Tokens are routed evenly, whatever the workload says."""
        return self.method == FORCED

    @property
    def plan(self) -> Plan | None:
        """Of the last forward; None where nothing plans."""
        return self.plans[-1] if self.plans else None

    def count_pairs(self, routing: Routing) -> np.ndarray:
        """Pairs int64 [E, P] that each rank has to compute of each expert."""
        if isinstance(self.layer, PlacedMoELayer):
            return self.layer.count_slots(routing.counts)
        if self.plan is not None:
            return self.plan.quota
        P, E = routing.counts.shape
        quota = np.zeros((E, P), dtype=np.int64)
        quota[np.arange(E), np.arange(E) // (E // P)] = routing.counts.sum(axis=0)
        return quota

    def expert_of_slot(self, rank: int) -> np.ndarray:
        """Experts int64 [n] in the slots of a rank, as the dispatcher sorts rows: -1 for none."""
        P, M = self.sizes.num_ranks, self.sizes.num_experts // self.sizes.num_ranks
        if self.slots is not None:
            return self.slots.reshape(P, -1)[rank]
        natives = np.arange(rank * M, (rank + 1) * M)
        foreign = self.plan.foreign_experts[rank] if self.plan is not None else []
        return np.concatenate((natives, foreign)).astype(np.int64)

    def weight_numbers(self) -> tuple[int, int]:
        """Numbers that all ranks send in a step, of weights forward and of gradients backward."""
        numbers = self.sizes.expert_numbers
        if self.plan is not None:
            lent = len(self.plan.transfers) * numbers
            return lent, lent
        if self.slots is not None:
            replicas = np.bincount(self.slots)
            # In a ring each of P ranks sends (P - 1) / P of it twice.
            return 0, 2 * (self.sizes.num_ranks - 1) * int((replicas > 1).sum()) * numbers
        return 0, 0

    def placed_experts(self) -> int:
        """Replicas that are on another rank than their expert's home: moved once, at the start."""
        if self.slots is None:
            return 0
        P, E, slots = self.sizes.num_ranks, self.sizes.num_experts, self.slots
        ranks = np.arange(len(slots)) // (len(slots) // P)
        # One copy a rank: what has two slots there is sent once.
        return len(np.unique((slots * P + ranks)[slots // (E // P) != ranks]))


def build_subject(
    method: str,
    sizes: LayerSizes,
    seed: int,
    *,
    history: Sequence[Routing],
    llep: LLEPConfig | None = None,
    build: Callable[..., MoELayer] = build_layer,
) -> Subject:
    """Build a method's layer; all ranks do so together.

    Args:
        method: its name.
        sizes: of the layer.
        seed: of its weights.
        history: routings of the steps before, by which EPLB places experts.
        llep: of a planner; None for other methods.
        build: for tests, which build a layer that errs.
    """
    slots = None
    if method in (EPLB, REPLICATED):
        slots = place_by_history(history, sizes, SPARE_SLOTS if method == REPLICATED else 0)
    layer = build(sizes, seed, slots)
    subject = Subject(method=method, layer=layer, sizes=sizes, slots=slots)
    if llep is not None:
        convert_model([layer], llep)
        layer.token_dispatcher.on_plan.append(
            lambda planned: subject.plans.__setitem__(slice(None), [planned.plan])
        )
    else:
        assert method in (PLAIN, FORCED, EPLB, REPLICATED)
    return subject


def place_by_history(history: Sequence[Routing], sizes: LayerSizes, spare: int) -> np.ndarray:
    """Experts int64 [S] of all slots, by the tokens that experts had in the steps before."""
    loads = np.sum([each.counts.sum(axis=0) for each in history], axis=0)
    P = sizes.num_ranks
    placed = place_replicas(loads, P, sizes.num_experts // P + spare)
    E = np.arange(sizes.num_experts)
    return np.concatenate([np.repeat(E, placed[:, rank]) for rank in range(P)])
