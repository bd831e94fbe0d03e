"""From routing counts to a plan: integers, numpy and numba, no torch.

`make_plan` decides how many tokens of each expert each rank computes; `sends`, `receives` and
`list_exchange` decide whose tokens these are. All are pure functions of the counts, with fixed
tie-breaking, so that ranks which gathered the same counts never have to exchange plans. What they
run is in `loops`, plain loops that `compile_planners` compiles; the first plan does so otherwise.
"""

from megatron_llep.planner.assignment import ORDERS, list_exchange, receives, sends
from megatron_llep.planner.compiled import compile_planners, compiled
from megatron_llep.planner.make import PLANNERS, make_plan
from megatron_llep.planner.plan import Plan, imbalance_of, plan_from_quota
from megatron_llep.planner.prices import Prices
from megatron_llep.planner.replicas import load_per_rank, plan_over_replicas
from megatron_llep.planner.topology import Topology

__all__ = [
    "ORDERS",
    "PLANNERS",
    "Plan",
    "Prices",
    "Topology",
    "compile_planners",
    "compiled",
    "imbalance_of",
    "list_exchange",
    "load_per_rank",
    "make_plan",
    "plan_from_quota",
    "plan_over_replicas",
    "receives",
    "sends",
]
