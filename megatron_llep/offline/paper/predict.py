"""The cost model's prediction for a setting of the paper.

As the paper's code does it: forward only, planner `lla`, tokens given out in rank order, and
experts sent whole to each borrower. Not as there: no rank borrows more experts than it hosts.

Shape letters: P ranks, E experts.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from megatron_llep.offline.paper.figures import NUM_RANKS, Setting
from megatron_llep.offline.workloads import make_counts, make_hot
from megatron_llep.planner import Plan, make_plan
from megatron_llep.planner.cost.model import CostModel, LayerShape
from megatron_llep.planner.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one layer, forward."""

    plain_seconds: float
    """Under plain expert parallelism."""
    method_seconds: float
    """Under the method, without the fixed cost."""
    lends: bool
    """False: the method falls back to plain expert parallelism, and the fixed cost is not paid."""

    def speedup(self, fixed_seconds: float) -> float:
        """Over plain expert parallelism, if a layer that lends costs so much besides."""
        fixed = fixed_seconds if self.lends else 0.0
        return self.plain_seconds / (self.method_seconds + fixed)


def predict(setting: Setting, cost: CostModel) -> Prediction:
    """Predict plain expert parallelism and the method.

    Args:
        setting: of a figure.
        cost: the machine. Its `planning_seconds` are left out: they are the fixed cost.
    """
    counts = route(setting)
    shape = LayerShape(
        hidden=setting.hidden,
        ffn_hidden=setting.ffn_hidden,
        num_experts=setting.num_experts,
        top_k=setting.top_k,
        scatter_from=0,
    )
    cost = dataclasses.replace(cost, planning_seconds=0.0)

    def time(plan: Plan) -> float:
        return cost.predict_layer(
            plan, counts, shape, Topology(), forward_only=True, order="rank_order"
        ).total

    lent = make_plan(
        counts,
        planner="lla",
        capacity_factor=setting.capacity_factor,
        imbalance_threshold=setting.threshold,
    )
    return Prediction(
        plain_seconds=time(make_plan(counts, planner="exact", max_foreign=0)),
        method_seconds=time(lent),
        lends=not lent.is_fallback,
    )


def route(setting: Setting) -> np.ndarray:
    """Counts [P, E]; a token may choose an expert several times, as in the published benchmark."""
    return make_counts(
        make_hot(setting.percent, setting.hot) if setting.hot else "balanced",
        num_ranks=NUM_RANKS,
        num_experts=setting.num_experts,
        tokens_per_rank=setting.tokens * setting.top_k,
        top_k=1,
    )
