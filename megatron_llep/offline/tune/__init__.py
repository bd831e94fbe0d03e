"""A run's routing, replayed under many settings: which is best, and whether it is worth it."""

from megatron_llep.offline.tune.choose import Choice, Outcome, choose
from megatron_llep.offline.tune.replay import Replayer, plan_setting
from megatron_llep.offline.tune.sample import Sample, read_sample
from megatron_llep.offline.tune.search import search
from megatron_llep.offline.tune.settings import list_nodes, make_grid

__all__ = [
    "Choice",
    "Outcome",
    "Replayer",
    "Sample",
    "choose",
    "list_nodes",
    "make_grid",
    "plan_setting",
    "read_sample",
    "search",
]
