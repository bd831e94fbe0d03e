"""What is logged, under which name, through Megatron's own tracker of MoE metrics.

Megatron's training log asks its tracker for a fixed list of router losses; ours adds LLEP's to the
same console line, TensorBoard writer and wandb run. Layers record, ranks reduce, names are given:
a file for each. `docs/metrics.md` has all names.
"""

from megatron_llep.metrics.names import METRICS, PREFIX, Metric
from megatron_llep.metrics.record import number_in_model, record_exchange, record_plan
from megatron_llep.metrics.tracker import LLEPMetricsTracker, install_tracker

__all__ = [
    "METRICS",
    "PREFIX",
    "LLEPMetricsTracker",
    "Metric",
    "install_tracker",
    "number_in_model",
    "record_exchange",
    "record_plan",
]
