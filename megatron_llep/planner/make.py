"""One entry point for all planners: check the arguments, plan, fall back to plain EP.

Shape letters: P ranks, E experts, M = E / P experts native to a rank.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from megatron_llep.planner.auto import choose_plan
from megatron_llep.planner.compiled import compiled
from megatron_llep.planner.plan import Plan, freeze_plan
from megatron_llep.planner.prices import USUAL_PRICES, Prices
from megatron_llep.planner.topology import ONE_NODE, Topology

if TYPE_CHECKING:
    from megatron_llep.planner.cost.model import LayerCost

PLANNERS = ("tolerant", "exact", "lla", "lp", "auto")
LLA_THRESHOLD = 1.3
"""The paper's lambda."""
MIN_TOKENS_PER_GEMM = 1024
"""The paper's m."""


def make_plan(
    counts: np.ndarray,
    *,
    planner: str = "tolerant",
    max_foreign: int | None = None,
    capacity_factor: float = 1.0,
    min_tokens_per_gemm: int = MIN_TOKENS_PER_GEMM,
    imbalance_threshold: float | None = None,
    tolerance: float = 0.05,
    topology: Topology = ONE_NODE,
    prices: Prices | None = None,
    cost: "LayerCost | None" = None,
) -> Plan:
    """Plan one layer of one micro-batch. Every rank gets the same plan from the same counts.

    The plan is a fall-back to plain expert parallelism (nothing lent, `is_fallback`) when the
    imbalance is below `imbalance_threshold`, and when the planner does not lower the largest
    load. (Imbalance is taken over ranks, as in the LLEP reference code.) On several nodes
    `tolerant` and `exact` go by who sends what, and lend where it saves traffic between nodes, too.

    Args:
        counts: integers [P, E], tokens that each rank routes to each expert. Experts g*M ..
            (g+1)*M - 1 are native to rank g.
        planner: one of `PLANNERS`.
        max_foreign: most foreign experts per rank, 0 .. M; None means M.
        capacity_factor: the paper's alpha; `lla` only.
        min_tokens_per_gemm: the paper's m; `lla` only (with the others no surplus stays home
            that a bound on the largest load forbids).
        imbalance_threshold: the paper's lambda; infinity never lends. None: `LLA_THRESHOLD` for
            `lla`; 1 + tolerance for the others, so that it changes nothing of `tolerant`. `auto`
            predicts instead whether lending pays.
        tolerance: `tolerant` lets the largest load exceed the mean by this part of it.
        topology: the nodes of the P ranks; one node by default.
        prices: of loans between nodes; None: those of the layer of `cost`, or usual ones.
        cost: the machine and the layer; `auto` needs it.

    Raises:
        ValueError: an argument is out of range; the message says which and what is allowed.
    """
    counts = np.asarray(counts)
    check_counts(counts)
    P, E = counts.shape
    if max_foreign is None:
        max_foreign = E // P
    threshold = imbalance_threshold
    if threshold is None:
        threshold = default_threshold(planner, tolerance)
        if goes_by_senders(planner, topology, P):
            threshold = 0.0  # a loan may pay where no rank has too much
    check_options(
        planner=planner,
        max_foreign=max_foreign,
        experts_per_rank=E // P,
        capacity_factor=capacity_factor,
        min_tokens_per_gemm=min_tokens_per_gemm,
        imbalance_threshold=threshold,
        tolerance=tolerance,
    )

    counts = np.ascontiguousarray(counts, np.int64)
    predicts = planner == "auto"
    if prices is None:
        prices = USUAL_PRICES if cost is None else cost.shape.prices

    def run(planner: str, tolerance: float = tolerance, topology: Topology = topology) -> Plan:
        return plan_counts(
            counts,
            planner=planner,
            max_foreign=max_foreign,
            capacity_factor=1.0 if predicts else capacity_factor,
            min_tokens_per_gemm=MIN_TOKENS_PER_GEMM if predicts else min_tokens_per_gemm,
            threshold=0.0 if predicts else threshold,
            tolerance=tolerance,
            topology=topology,
            prices=prices,
            falls_back=not predicts,
        )

    if not predicts:
        return run(planner)
    if cost is None:
        raise ValueError("planner='auto' predicts times: give it a cost model with cost=")
    return choose_plan(run, counts, topology, cost)


def plan_counts(
    counts: np.ndarray,
    *,
    planner: str,
    max_foreign: int,
    capacity_factor: float,
    min_tokens_per_gemm: int,
    threshold: float,
    tolerance: float,
    topology: Topology,
    prices: Prices,
    falls_back: bool,
) -> Plan:
    """Run one planner, whose options `make_plan` describes and checks.

    Args:
        counts: int64 [P, E], C-contiguous.
        planner: any but `auto`; `lp` lends nothing.
        max_foreign: as `make_plan`, and the rest.
        capacity_factor: of `lla`.
        min_tokens_per_gemm: of `lla`.
        threshold: the imbalance below which nothing is lent.
        tolerance: of `tolerant`.
        topology: of the P ranks.
        prices: of loans between nodes.
        falls_back: lend nothing if the largest load would not fall.
    """
    P = len(counts)
    limits = max_foreign, topology.node_size(P)
    if goes_by_senders(planner, topology, P):
        tolerance = tolerance if planner == "tolerant" else 0.0
        of_loans = np.array([prices.weights, prices.gradients, prices.scatter_from], np.int64)
        found = compiled("planners.nodes")(
            counts, *limits, threshold, falls_back, tolerance, of_loans
        )
    else:
        options: dict[str, tuple[float, ...]] = {
            "tolerant": (tolerance,),
            "lla": (capacity_factor, min_tokens_per_gemm),
        }
        found = compiled(f"planners.{planner}")(
            counts,
            *limits,
            topology.lend_across_nodes,
            threshold,
            falls_back,
            *options.get(planner, ()),
        )
    quota, foreign_experts, transfers, smallest, *loads = found
    if smallest < 0:
        raise ValueError(f"counts must not be negative, the smallest is {smallest}")
    return freeze_plan(quota, foreign_experts, transfers, *loads)


def goes_by_senders(planner: str, topology: Topology, num_ranks: int) -> bool:
    """Whether a planner looks at who sends what, and not at sums: where there are several nodes."""
    several = topology.lend_across_nodes and topology.node_size(num_ranks) < num_ranks
    return several and planner in ("tolerant", "exact")


def default_threshold(planner: str, tolerance: float) -> float:
    """The imbalance below which `make_plan` falls back when no threshold is given."""
    if planner == "auto":
        return 0.0
    return LLA_THRESHOLD if planner == "lla" else 1 + tolerance


def check_counts(counts: np.ndarray) -> None:
    """Raise ValueError unless counts are integers [P, E] with P dividing E."""
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"counts must be a non-empty [P, E] array, not {list(counts.shape)}")
    if counts.dtype.kind not in "iu":
        raise ValueError(f"counts must be integers, not {counts.dtype}: convert them to int64")
    P, E = counts.shape
    if E % P:
        raise ValueError(f"{E} experts do not divide over {P} ranks: use a multiple of {P}")


def check_options(
    *,
    planner: str,
    max_foreign: int,
    experts_per_rank: int,
    capacity_factor: float,
    min_tokens_per_gemm: int,
    imbalance_threshold: float,
    tolerance: float,
) -> None:
    """Raise ValueError for an option of `make_plan` that is out of range."""
    if planner not in PLANNERS:
        raise ValueError(f"planner={planner!r} is unknown: choose one of {', '.join(PLANNERS)}")
    if not 0 <= max_foreign <= experts_per_rank:
        raise ValueError(
            f"max_foreign={max_foreign} must lie in 0 .. {experts_per_rank}, the experts per rank"
        )
    if not 1 <= capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor={capacity_factor} must be finite and at least 1: "
            "below 1 the ranks cannot hold all tokens"
        )
    if not min_tokens_per_gemm >= 0:
        raise ValueError(f"min_tokens_per_gemm={min_tokens_per_gemm} must be at least 0")
    if not imbalance_threshold >= 0:
        raise ValueError(
            f"imbalance_threshold={imbalance_threshold} must be at least 0; 0 always plans"
        )
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance} must be finite and at least 0")
