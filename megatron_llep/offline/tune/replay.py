"""What layers of a run would have taken under a setting, by the cost model.

A threshold only says from which imbalance on a plan is used, so a planner's plans are made once for
all of its thresholds.

Shape letters: N layers, P ranks, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_llep.config import LLEPConfig
from megatron_llep.planner import Plan, make_plan
from megatron_llep.planner.cost.model import LayerCost
from megatron_llep.planner.make import default_threshold, goes_by_senders
from megatron_llep.planner.topology import ONE_NODE, Topology


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """Layers under one setting."""

    seconds: np.ndarray
    """float [N], forward and backward."""
    foreign: np.ndarray
    """int64 [N], foreign experts of the rank with most of them."""
    lent: np.ndarray
    """int64 [N], experts lent."""


def plan_setting(
    counts: np.ndarray, setting: LLEPConfig, cost: LayerCost, found: Topology = ONE_NODE
) -> Plan:
    """The plan that training with these settings makes of counts [P, E], without replicas.

    Args:
        counts: integers.
        setting: which planner, and its numbers; a `cost_model` is not read.
        cost: what planner auto predicts with, and the prices of loans between nodes.
        found: the nodes that are found where the setting does not tell them.
    """
    return make_plan(
        counts,
        planner=setting.planner,
        max_foreign=setting.max_foreign_experts,
        capacity_factor=setting.capacity_factor,
        min_tokens_per_gemm=setting.min_tokens_per_gemm,
        imbalance_threshold=setting.imbalance_threshold,
        tolerance=setting.tolerance,
        topology=_tell_topology(setting, found),
        cost=cost,
    )


def _tell_topology(setting: LLEPConfig, found: Topology) -> Topology:
    """What planners go by."""
    return Topology(
        ranks_per_node=setting.ranks_per_node or found.ranks_per_node,
        lend_across_nodes=setting.lend_to == "any_node",
    )


def drop_threshold(setting: LLEPConfig) -> LLEPConfig:
    """The same setting, planning whatever the imbalance; equal for settings that share plans."""
    return replace(setting, imbalance_threshold=0.0)


class Replayer:
    """Predicts layers under settings, and remembers what plain expert parallelism takes."""

    def __init__(
        self,
        counts: Sequence[np.ndarray],
        cost: LayerCost,
        topology: Topology,
        order: str = "local_first",
        found: Topology | None = None,
    ):
        """Predict plain expert parallelism.

        Args:
            counts: N of integers [P, E].
            cost: machine and layer.
            topology: which ranks really share a node, whatever a setting says.
            order: which tokens of a lent expert go where (`--moe-llep-token-assignment`).
            found: the nodes that training finds where a setting does not tell them; None: they are
                as they are.
        """
        self._counts, self._cost, self._topology, self._order = counts, cost, topology, order
        self._found = found or topology
        self._known: list[dict[int, float]] = [{} for _ in counts]
        plans = [make_plan(each, planner="exact", max_foreign=0) for each in counts]
        self.imbalance = np.array([plan.imbalance_before for plan in plans])
        """float [N], under plain expert parallelism."""
        self.plain = np.array([self._predict(n, plan) for n, plan in enumerate(plans)])
        """float [N] seconds of plain expert parallelism."""

    @property
    def num_layers(self) -> int:
        """N."""
        return len(self._counts)

    def run_planned(self, setting: LLEPConfig, rows: np.ndarray) -> Replay:
        """Layers `rows`, planned whatever their imbalance is."""
        setting = drop_threshold(setting)
        seconds = np.zeros(len(rows))
        foreign, lent = (np.zeros(len(rows), np.int64) for _ in range(2))
        for at, row in enumerate(rows.tolist()):
            plan = plan_setting(self._counts[row], setting, self._cost, self._found)
            seconds[at] = self._predict(row, plan)
            foreign[at], lent[at] = plan.max_foreign, len(plan.transfers)
        return Replay(seconds=seconds, foreign=foreign, lent=lent)

    def apply_threshold(self, setting: LLEPConfig, planned: Replay, rows: np.ndarray) -> Replay:
        """What `run_planned` found for the setting, with plain layers below its threshold."""
        if setting.planner == "auto":
            return planned
        threshold = setting.imbalance_threshold
        if threshold is None:
            threshold = default_threshold(setting.planner, setting.tolerance)
            told = _tell_topology(setting, self._found)
            if goes_by_senders(setting.planner, told, len(self._counts[0])):
                return planned
        lends = self.imbalance[rows] >= threshold
        return Replay(
            seconds=np.where(lends, planned.seconds, self.plain[rows]),
            foreign=np.where(lends, planned.foreign, 0),
            lent=np.where(lends, planned.lent, 0),
        )

    def run(self, setting: LLEPConfig) -> Replay:
        """All layers."""
        rows = np.arange(self.num_layers)
        return self.apply_threshold(setting, self.run_planned(setting, rows), rows)

    def _predict(self, row: int, plan: Plan) -> float:
        """Seconds of a layer; settings often make the same plan."""
        known, key = self._known[row], plan.digest
        if key not in known:
            shape, counts = self._cost.shape, self._counts[row]
            time = self._cost.model.predict_layer(
                plan, counts, shape, self._topology, order=self._order
            )
            known[key] = time.total
        return known[key]
