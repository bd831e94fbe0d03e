"""From routing counts to a plan: integers and numpy only, no torch.

`make_plan` decides how many tokens of each expert each rank computes; `sends` and `receives`
decide whose tokens these are. All are pure functions of the counts, with fixed tie-breaking, so
that ranks which gathered the same counts never have to exchange plans.
"""

from megatron_llep.planner.assignment import ORDERS, receives, sends
from megatron_llep.planner.make import PLANNERS, make_plan
from megatron_llep.planner.plan import Plan, imbalance_of, plan_from_quota, slot_of_expert
from megatron_llep.planner.replicas import load_per_rank, plan_over_replicas
from megatron_llep.planner.topology import Topology

__all__ = [
    "ORDERS",
    "PLANNERS",
    "Plan",
    "Topology",
    "imbalance_of",
    "load_per_rank",
    "make_plan",
    "plan_from_quota",
    "plan_over_replicas",
    "receives",
    "sends",
    "slot_of_expert",
]
