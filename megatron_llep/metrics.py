"""What is logged, under which name, through Megatron's own tracker of MoE metrics.

Letters: K metrics, L layers of the whole model (multi-token prediction layers last).

Megatron's training log asks its tracker for a fixed list of router losses; the tracker below adds
LLEP's to the same console line, TensorBoard writer and wandb run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import (
    MetricEntry,
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.planner import Plan, imbalance_of


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number per layer and micro-batch; averaged over micro-batches, then across layers."""

    name: str
    help: str
    across_layers: Callable[[np.ndarray], np.floating]


LINK_METRIC = "lent_link_mib"
"""Not known with the plan: measured at each exchange, of forward and backward."""

METRICS = (
    Metric(
        name="overload_factor_before",
        help="most loaded rank's tokens / mean, as plain expert parallelism would run; worst layer",
        across_layers=np.max,
    ),
    Metric(
        name="overload_factor_after",
        help="most loaded rank's tokens / mean, as it ran; worst layer",
        across_layers=np.max,
    ),
    Metric(
        name="max_tokens_before",
        help="(token, expert) pairs on the most loaded rank under plain EP; worst layer",
        across_layers=np.max,
    ),
    Metric(
        name="max_tokens_after",
        help="(token, expert) pairs that the most loaded rank computed; worst layer",
        across_layers=np.max,
    ),
    Metric(
        name="lent_experts",
        help="experts lent, all ranks that share tokens; sum over layers",
        across_layers=np.sum,
    ),
    Metric(
        name="lent_mib",
        help="weights lent, MiB, all ranks that share tokens; sum over layers",
        across_layers=np.sum,
    ),
    Metric(
        name=LINK_METRIC,
        help="most that one rank sent, or received, of lent weights and their gradients, MiB; sum "
        "over layers",
        across_layers=np.sum,
    ),
    Metric(
        name="foreign_mib",
        help="most foreign weights alive at once on this rank, MiB, all layers and micro-batches",
        across_layers=np.max,
    ),
    Metric(
        name="fallback_rate",
        help="share of layers and micro-batches that ran plain expert parallelism",
        across_layers=np.mean,
    ),
    Metric(name="plan_ms", help="time to plan, ms; sum over layers", across_layers=np.sum),
)
PREFIX = "moe/llep/"


class LLEPMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, which also sums up what each layer's plans did."""

    def __init__(self, metrics: dict[str, MetricEntry] | None = None):
        super().__init__()
        self._metrics = metrics or {}
        self._sums: dict[int, np.ndarray] = {}  # layer -> [1 + K], the number of plans first
        # Layer -> [2] bytes that this rank sent and received for lent experts.
        self._exchanged: dict[int, np.ndarray] = {}
        self._lending_group: dist.ProcessGroup | None = None

    def record_layer(self, layer: int, values: dict[str, float]) -> None:
        """Add one plan's metrics; `layer` counts from 0 over the whole model."""
        values = {LINK_METRIC: 0.0, **values}
        row = np.array([1.0, *(values[metric.name] for metric in METRICS)])
        self._sums[layer] = self._sums.get(layer, 0) + row

    def record_exchange(
        self, layer: int, sent: int, received: int, group: dist.ProcessGroup
    ) -> None:
        """Add the bytes of one exchange of lent experts among the ranks of the group."""
        self._exchanged[layer] = self._exchanged.get(layer, 0) + np.array([sent, received])
        self._lending_group = group

    def report(self, loss_scale, iteration, writer=None, wandb_writer=None, **kwargs) -> str:
        """Report Megatron's metrics, then LLEP's; every rank must call it, as it reduces."""
        num_layers = (kwargs.get("num_layers") or 0) + (kwargs.get("mtp_num_layers") or 0)
        per_layer = self._reduce(num_layers, kwargs.get("pg_collection"))
        line = super().report(loss_scale, iteration, writer, wandb_writer, **kwargs)  # clears
        ran = per_layer[0] > 0
        if not ran.any():
            return line

        scalars = {}
        for metric, values in zip(METRICS, per_layer[1:], strict=True):
            values = values[ran] / per_layer[0][ran]
            scalars[PREFIX + metric.name] = float(metric.across_layers(values))
            line += f" {metric.name}: {scalars[PREFIX + metric.name]:.2f} |"
            if kwargs.get("per_layer_logging"):
                layers = np.flatnonzero(ran)
                for layer, value in zip(layers, values, strict=True):
                    scalars[f"{PREFIX}{metric.name}_layer_{layer}"] = float(value)
        self._log_scalars(scalars, iteration, writer, wandb_writer)
        return line

    def clear(self) -> None:
        """Forget all values, as Megatron does after evaluation."""
        super().clear()
        self._sums.clear()
        self._exchanged.clear()

    def _reduce(self, num_layers: int, pg_collection) -> np.ndarray:
        """[1 + K, L] sums over this rank's pipeline, averaged over data-parallel ranks.

        Of the bytes of lent experts, which differ between the ranks that share tokens, those of the
        busiest.
        """
        table = torch.zeros(1 + len(METRICS), num_layers)
        for layer, row in self._sums.items():
            table[:, layer] = torch.from_numpy(row)
        link = 1 + [metric.name for metric in METRICS].index(LINK_METRIC)
        for layer, ways in self._exchanged.items():
            table[link, layer] = float(ways.max()) / 2**20
        if torch.cuda.is_available():
            table = table.cuda()
        if self._exchanged:  # on all ranks of the group or on none
            busiest = table[link].contiguous()
            dist.all_reduce(busiest, op=dist.ReduceOp.MAX, group=self._lending_group)
            table[link] = busiest
        self._metrics["llep"] = MetricEntry(values=table)
        self._sync_metrics(["llep"], pg_collection)
        del self._metrics["llep"]
        return table.cpu().numpy()


def install_tracker() -> None:
    """Put our tracker in the place of Megatron's; call it on every rank, with MoE layers or not."""
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, LLEPMetricsTracker):
        set_moe_metrics_tracker(LLEPMetricsTracker(tracker.metrics))


def record_plan(
    plan: Plan,
    load_before: np.ndarray,
    *,
    layer_number: int,
    is_mtp_layer: bool,
    config: TransformerConfig,
    expert_bytes: int,
    foreign_bytes: int,
    plan_seconds: float,
) -> None:
    """Record what one plan did, if our tracker is in place.

    Args:
        plan: the plan of this layer and micro-batch.
        load_before: tokens on each rank under plain expert parallelism. (The plan's own "before"
            is after tokens were spread over replicas.)
        layer_number: from 1, as Megatron counts; multi-token prediction layers from 1 again.
        is_mtp_layer: whether this is such a layer.
        config: of the model.
        expert_bytes: bytes of one expert's weights on one rank.
        foreign_bytes: most bytes of foreign weights alive on this rank since the last plan.
        plan_seconds: time the plan took.
    """
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, LLEPMetricsTracker):
        return
    lent = len(plan.transfers)
    values = {
        "overload_factor_before": imbalance_of(load_before.tolist()),
        "overload_factor_after": plan.imbalance_after,
        "max_tokens_before": load_before.max(),
        "max_tokens_after": plan.load_per_rank_after.max(),
        "lent_experts": lent,
        "lent_mib": lent * expert_bytes / 2**20,
        "foreign_mib": foreign_bytes / 2**20,
        "fallback_rate": np.array_equal(plan.load_per_rank_after, load_before),
        "plan_ms": plan_seconds * 1e3,
    }
    tracker.record_layer(layer_number - 1 + is_mtp_layer * config.num_layers, values)


def record_exchange(
    sent: int,
    received: int,
    *,
    layer_number: int,
    is_mtp_layer: bool,
    config: TransformerConfig,
    group: dist.ProcessGroup,
) -> None:
    """Record one exchange of lent experts, or of their gradients, if our tracker is in place.

    Args:
        sent: bytes that this rank sends to others.
        received: bytes that it gets from others.
        layer_number: as for `record_plan`.
        is_mtp_layer: likewise.
        config: of the model.
        group: the ranks that take part.
    """
    tracker = get_moe_metrics_tracker()
    if isinstance(tracker, LLEPMetricsTracker):
        layer = layer_number - 1 + is_mtp_layer * config.num_layers
        tracker.record_exchange(layer, sent, received, group)
