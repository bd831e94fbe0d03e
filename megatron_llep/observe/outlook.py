"""What planners would have done with the routing that was seen, and what it would have gained.

Letters: P ranks that share tokens, E experts, R sources (these ranks, and their
expert-tensor-parallel ranks), L layers of the whole model, O rows of the table of sums.

The gain is predicted by a cost model, whose machine need not be the one at hand. The rest of the
model runs at the cost model's full rate, as in the simulator.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_llep.planner import Plan, Topology, make_plan
from megatron_llep.planner.cost.model import LayerCost

PLANNERS = ("tolerant", "exact", "lla", "auto")
"""Those that lend; `auto` where a cost model is given."""
_OF_ALL = ("planned", "tokens", "imbalance", "seconds")
_OF_PLANNER = ("imbalance", "lent", "seconds")
NUM_ROWS = len(_OF_ALL) + len(PLANNERS) * len(_OF_PLANNER)
"""O: of plain expert parallelism, then of each planner."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """How to plan ahead."""

    options: Mapping[str, float | int | None]
    """Of `make_plan`, as they are set for lending."""
    topology: Topology
    cost: LayerCost
    """The machine and the layer."""
    is_assumed: bool
    """Whether nobody has named the machine; `auto` is left out then."""

    @property
    def planners(self) -> tuple[str, ...]:
        """Those that are tried."""
        return PLANNERS[:-1] if self.is_assumed else PLANNERS

    def plan(self, counts: np.ndarray, planner: str) -> Plan:
        """What a planner makes of counts [P, E]."""
        return make_plan(
            counts,
            planner=planner,
            topology=self.topology,
            cost=self.cost,
            **self.options,  # type: ignore[arg-type]
        )

    def look(self, counts: np.ndarray, num_sources: int) -> np.ndarray:
        """[O] numbers of one layer and micro-batch, to be summed up.

        Args:
            counts: int64 [P, E].
            num_sources: R.
        """
        plain = make_plan(counts, planner="exact", max_foreign=0)
        time = self.cost.predict(plain, counts, self.topology)
        tokens = counts.sum() / self.cost.shape.top_k / num_sources
        row = [1.0, float(tokens), plain.imbalance_after, time.total]
        for planner in PLANNERS:
            if planner not in self.planners:
                row += [0.0] * len(_OF_PLANNER)
                continue
            plan = self.plan(counts, planner)
            time = self.cost.predict(plan, counts, self.topology)
            row += [plan.imbalance_after, float(len(plan.transfers)), time.total]
        return np.array(row)


def choose_evenly(number: int, most: int) -> list[int]:
    """Which of so many things to look at: all, or as many as `most`, evenly spread."""
    chosen = min(number, most)
    return [(2 * k + 1) * number // (2 * chosen) for k in range(chosen)]


def summarise_outlook(
    table: np.ndarray, *, num_layers: int, other_seconds: float
) -> dict[str, float]:
    """Metrics by name; none where nothing was planned ahead.

    Args:
        table: [O, L] sums over ranks.
        num_layers: of the model that have experts.
        other_seconds: that the rest of the model takes for a token of a rank; 0 if not known.
    """
    planned, tokens, imbalance, seconds, *rest = table.sum(axis=1).tolist()
    if planned == 0:
        return {}
    values = {"outlook_planned": planned, "outlook_plain_imbalance": imbalance / planned}
    other = tokens * other_seconds / num_layers  # beside one layer
    for number, planner in enumerate(PLANNERS):
        first = number * len(_OF_PLANNER)
        imbalance, lent, needed = rest[first : first + len(_OF_PLANNER)]
        if imbalance == 0:  # it was not tried
            continue
        name = f"outlook_{planner}_"
        values[name + "imbalance"] = imbalance / planned
        values[name + "lent_experts"] = lent / planned
        if seconds > 0:
            values[name + "layer_gain"] = 100 * (seconds - needed) / seconds
            if other > 0:
                values[name + "step_gain"] = 100 * (seconds - needed) / (seconds + other)
    return values
