"""Predict a model's steps under plain expert parallelism, each planner, and replica placement.

A step is one micro-batch, forward and backward, through all layers, one after another. The
simulated layers stand for all MoE layers of the model. The rest of the model
(`other_flops_per_token`) runs at the cost model's full rate, equally under all methods.

Memory is that of the worst rank: the pairs it computes, each with input, inner activations and
output as kept for backward; and experts beyond its share, weights and gradients. The methods'
common memory (native experts, optimizer, the rest of the model) is left out. Lent weights stay from
forward to backward unless the layer's shape says `refetch`; their gradients are gone after each
layer; replicas stay.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megatron_llep.offline.lp import lp_quota
from megatron_llep.offline.simulator.eplb import place_replicas, spread_evenly
from megatron_llep.offline.simulator.models import ModelShape
from megatron_llep.planner import Plan, make_plan, plan_from_quota
from megatron_llep.planner.cost.across import NodeBytes, count_node_bytes
from megatron_llep.planner.cost.layer_time import LayerTime
from megatron_llep.planner.cost.model import EXCHANGES, CostModel, LayerCost
from megatron_llep.planner.cost.traffic import count_tokens
from megatron_llep.planner.topology import Topology

METHODS = ("plain", "lla", "exact", "tolerant", "auto", "eplb", "eplb+lp", "optimum")
"""plain: expert parallelism without lending. eplb: replicas placed by recent loads, tokens spread
evenly. eplb+lp: the same replicas, tokens spread by the linear program. optimum: the program's
least load with every expert on every rank, which `exact` reaches, and nothing paid for lending."""

PLACED = ("eplb", "eplb+lp")

OPTIMIZER_BYTES = 12
"""Of a weight: fp32 master copy and two moments, which move with a replica that is placed anew."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to simulate."""

    model: ModelShape
    cost: CostModel
    topology: Topology
    make_counts: Callable[[int, int], np.ndarray]
    """(layer, step) -> [P, E]."""
    layers: int = 1
    steps: int = 1
    replace_every: int = 10
    """Steps between two placements of replicas."""
    spare_slots: int = 1
    """Experts a rank holds beyond its share for replicas."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Means over the simulated layers and steps, unless said otherwise."""

    imbalance: float
    """Largest load of a rank / mean load."""
    layer: LayerTime
    step_seconds: float
    """The whole model."""
    transfers: float
    """Experts lent, or placed anew, in a layer."""
    layer_bytes: int
    """Memory of the worst rank in the worst layer."""
    model_bytes: int
    """The same for all layers, without recompute."""
    token_gigabytes: float
    """Between all ranks in a layer, forward and backward."""
    expert_gigabytes: float
    """The same for weights and gradients of experts."""
    across_gigabytes: float
    """What crosses between nodes of tokens and lent experts; not of replicas' weights."""
    busiest_gigabytes: float
    """Of that, what is waited for: of each exchange the busiest direction of a node's link."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """One method in one layer of one step."""

    plan: Plan
    time: LayerTime
    transfers: int
    extra_slots: np.ndarray
    """[P] experts beyond a rank's share."""
    are_replicas: bool
    """These experts stay where they are from step to step."""
    token_gigabytes: float
    expert_gigabytes: float
    across: NodeBytes


def simulate(
    case: Case, methods: tuple[str, ...] = METHODS, on_step: Callable[[], None] = lambda: None
) -> dict[str, Outcome]:
    """Predict every method for the same routing.

    Args:
        case: model, machine and routing.
        methods: of `METHODS`.
        on_step: called after each simulated step, for a progress bar.

    Raises:
        ValueError: unknown method, or the sizes do not fit.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown: choose of {', '.join(METHODS)}")
    start = 2 * case.replace_every
    placements = {m: _place_all(case) for m in PLACED if m in methods}
    steps: dict[str, list[list[_Layer]]] = {method: [] for method in methods}
    tokens = 0.0
    for step in range(start, start + case.steps):
        of_step = [case.make_counts(layer, step) for layer in range(case.layers)]
        tokens += max(int(c.sum(axis=1).max()) for c in of_step) / case.model.layer.top_k
        for method in methods:
            if method in placements:
                ran = [
                    placement.run(counts, method)
                    for placement, counts in zip(placements[method], of_step, strict=True)
                ]
            else:
                ran = [_run_plan(case, counts, method) for counts in of_step]
            steps[method].append(ran)
        on_step()
    other = _other_seconds(case, tokens / case.steps)
    return {method: _summarise(case, ran, other) for method, ran in steps.items()}


def _run_plan(case: Case, counts: np.ndarray, method: str) -> _Layer:
    """One layer under plain expert parallelism, a planner, or the optimum."""
    options: dict[str, object] = {"planner": method, "topology": case.topology}
    options["prices"] = case.model.layer.prices
    if method == "plain":
        options |= {"planner": "exact", "max_foreign": 0}
    elif method == "optimum":
        options = {"planner": "exact", "imbalance_threshold": 0.0}
    elif method == "auto":
        options["cost"] = LayerCost(model=case.cost, shape=case.model.layer)
    plan = make_plan(counts, **options)  # type: ignore[arg-type]
    shape, transfers = case.model.layer, len(plan.transfers)
    time = case.cost.predict_layer(plan, counts, shape, case.topology)
    extra = (plan.foreign_experts >= 0).sum(axis=1)
    if method == "optimum":
        time = dataclasses.replace(time, lending=0.0, returning=0.0, planning=0.0)
        extra, transfers = np.zeros_like(extra), 0
    moved = transfers * (shape.expert_bytes * (1 + shape.refetch) + shape.gradient_bytes)
    return _Layer(
        plan=plan,
        time=time,
        transfers=transfers,
        extra_slots=extra,
        are_replicas=False,
        token_gigabytes=_token_gigabytes(case, plan, counts),
        expert_gigabytes=moved / 1e9,
        across=count_node_bytes(plan, counts, shape, case.topology),
    )


def _place_all(case: Case) -> list["_Placement"]:
    """Each layer's replicas, as they are before the first simulated step."""
    N = case.replace_every
    loads = [
        [case.make_counts(layer, step).sum(axis=0) for step in range(2 * N)]
        for layer in range(case.layers)
    ]
    P = case.make_counts(0, 0).shape[0]
    return [_Placement(case, P, of_layer[:N], of_layer[N:]) for of_layer in loads]


class _Placement:
    """The replicas of one layer, placed anew every N steps from the loads of the last N."""

    def __init__(
        self, case: Case, P: int, before: list[np.ndarray], recent: list[np.ndarray]
    ) -> None:
        self.case = case
        self.slots = len(before[0]) // P + case.spare_slots
        self.placed = place_replicas(np.sum(before, axis=0), P, self.slots)
        self.recent = recent

    def run(self, counts: np.ndarray, method: str) -> _Layer:
        """One layer of the next step."""
        moves, seconds = self._place_anew()
        loads = counts.sum(axis=0)
        holders = self.placed > 0
        if method == "eplb+lp":
            quota = lp_quota(loads, holders)
        else:
            quota = spread_evenly(loads, self.placed)
        # Replicas are there already: nothing is lent.
        plan = dataclasses.replace(
            plan_from_quota(quota), transfers=np.zeros((0, 3), dtype=np.int64), is_fallback=True
        )
        shape = self.case.model.layer
        time = self.case.cost.predict_layer(plan, counts, shape, self.case.topology)
        share = 1 - 1 / holders.sum(axis=1)  # of a gradient, that each holder sends and gets
        reduced = 2 * (holders * share[:, None]).sum(axis=0) * shape.gradient_bytes
        time = dataclasses.replace(
            time, lending=seconds, returning=float(reduced.max()) / self._bytes_per_second()
        )
        self.recent.append(loads)
        return _Layer(
            plan=plan,
            time=time,
            transfers=moves,
            extra_slots=np.full(len(counts), self.case.spare_slots),
            are_replicas=True,
            token_gigabytes=_token_gigabytes(self.case, plan, counts),
            expert_gigabytes=(float(reduced.sum()) + moves * self._moved_bytes()) / 1e9,
            across=count_node_bytes(plan, counts, shape, self.case.topology),
        )

    def _place_anew(self) -> tuple[int, float]:
        """Replicas that move to a rank, and the seconds it takes the rank that gets most."""
        if len(self.recent) < self.case.replace_every:
            return 0, 0.0
        placed = place_replicas(np.sum(self.recent, axis=0), self.placed.shape[1], self.slots)
        arrivals = ((placed > 0) & (self.placed == 0)).sum(axis=0)
        self.placed, self.recent = placed, []
        seconds = int(arrivals.max()) * self._moved_bytes() / self._bytes_per_second()
        return int(arrivals.sum()), seconds

    def _moved_bytes(self) -> int:
        """Of a replica that is placed on another rank."""
        shape = self.case.model.layer
        return shape.expert_bytes + shape.expert_weights * OPTIMIZER_BYTES

    def _bytes_per_second(self) -> float:
        """Of the links that replicas and their gradients cross."""
        cost, topology = self.case.cost, self.case.topology
        link = cost.intra_node if topology.ranks_per_node is None else cost.inter_node
        return link.bytes_per_second


def _token_gigabytes(case: Case, plan: Plan, counts: np.ndarray) -> float:
    """All pairs that cross a link, in all exchanges of a layer."""
    sent = count_tokens(plan, counts, case.topology)[:, 0].sum()
    return float(sent) * EXCHANGES * case.model.layer.token_bytes / 1e9


def _other_seconds(case: Case, tokens: float) -> float:
    """What is not an MoE layer's experts, forward and backward, of so many tokens on a rank."""
    forward = tokens * case.model.other_flops_per_token / case.cost.flops_per_second
    return forward * (1 + case.cost.backward_factor)


def _pair_bytes(case: Case) -> int:
    """Kept of one pair: input, output, and the inner activations before and after the gate."""
    shape = case.model.layer
    numbers = 2 * shape.hidden + (3 if shape.gated else 2) * shape.ffn_hidden
    return numbers * shape.bytes_per_element


def _summarise(case: Case, steps: list[list[_Layer]], other: float) -> Outcome:
    """Means over layers and steps; memory of the worst."""
    ran = [layer for of_step in steps for layer in of_step]
    shape = case.model.layer
    pair_bytes, expert_bytes = _pair_bytes(case), shape.expert_bytes + shape.gradient_bytes

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    time = LayerTime(
        **{
            part.name: mean(getattr(layer.time, part.name) for layer in ran)
            for part in dataclasses.fields(LayerTime)
        }
    )
    return Outcome(
        imbalance=mean(layer.plan.imbalance_after for layer in ran),
        layer=time,
        step_seconds=case.model.moe_layers * time.total + other,
        transfers=mean(layer.transfers for layer in ran),
        layer_bytes=max(
            int(
                (
                    layer.plan.load_per_rank_after * pair_bytes + layer.extra_slots * expert_bytes
                ).max()
            )
            for layer in ran
        ),
        model_bytes=max(_model_bytes(case, of_step, pair_bytes) for of_step in steps),
        token_gigabytes=mean(layer.token_gigabytes for layer in ran),
        expert_gigabytes=mean(layer.expert_gigabytes for layer in ran),
        across_gigabytes=mean(layer.across.total / 1e9 for layer in ran),
        busiest_gigabytes=mean(layer.across.busiest / 1e9 for layer in ran),
    )


def _model_bytes(case: Case, layers: list[_Layer], pair_bytes: int) -> int:
    """Memory of the worst rank over all layers of one step."""
    shape, scale = case.model.layer, case.model.moe_layers / len(layers)
    pairs = scale * np.sum([layer.plan.load_per_rank_after for layer in layers], axis=0)
    slots = np.array([layer.extra_slots for layer in layers])
    in_all_layers, in_one = scale * slots.sum(axis=0), slots.max(axis=0)
    replicas = layers[0].are_replicas
    weights = in_all_layers if replicas or not shape.refetch else in_one
    gradients = in_all_layers if replicas else in_one
    experts = weights * shape.expert_bytes + gradients * shape.gradient_bytes
    return int((pairs * pair_bytes + experts).max())
