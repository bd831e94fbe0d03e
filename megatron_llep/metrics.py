"""What is logged, under which name, through Megatron's own tracker of MoE metrics.

Letters: K metrics, L layers of the whole model (multi-token prediction layers last).

Megatron's training log asks its tracker for a fixed list of router losses; the tracker below adds
LLEP's to the same console line, TensorBoard writer and wandb run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import (
    MetricEntry,
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.planner import Plan, imbalance_of

if TYPE_CHECKING:
    from megatron_llep.observe.recorder import Recorder

Over = Literal["mean", "max"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number, at least 0, and how one of a whole step comes of it, in the order below."""

    name: str
    help: str
    over_micro_batches: Over = "mean"
    """Of one layer on one rank."""
    over_sharers: Over = "mean"
    """The ranks that share tokens. What follows from their plan is the same on all of them."""
    over_ranks: Over = "mean"
    """All ranks that have the layer; with it the mean of those that share tokens, too."""
    across_layers: Callable[[np.ndarray], np.floating]


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
        name="lent_link_mib",
        help="most that one rank sent, or received, of lent weights and their gradients, MiB; sum "
        "over layers",
        over_sharers="max",
        across_layers=np.sum,
    ),
    Metric(
        name="foreign_mib",
        help="most foreign weights alive at once on any rank, MiB, all layers and micro-batches",
        over_micro_batches="max",
        over_sharers="max",
        over_ranks="max",
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
_MAXIMA = frozenset(metric.name for metric in METRICS if metric.over_micro_batches == "max")


class _Recorded:
    """What layers recorded on this rank, by layer of the whole model, from 0."""

    def __init__(self) -> None:
        self.plans: dict[int, int] = {}
        self._values: dict[int, dict[str, list[float]]] = {}

    def add_plan(self, layer: int, count: int = 1) -> None:
        self.plans[layer] = self.plans.get(layer, 0) + count

    def add(self, layer: int, name: str, values: list[float]) -> None:
        recorded = self._values.setdefault(layer, {})
        if name in recorded:
            join = max if name in _MAXIMA else add
            values = list(map(join, recorded[name], values))
        recorded[name] = values

    def add_all(self, other: "_Recorded") -> None:
        for layer, count in other.plans.items():
            self.add_plan(layer, count)
        for layer, recorded in other._values.items():
            for name, values in recorded.items():
                self.add(layer, name, values)

    def of_layer(self, layer: int) -> dict[str, float]:
        """A layer's metrics, over its micro-batches."""
        values = {}
        for metric in METRICS:
            value = max(self._values[layer].get(metric.name, [0.0]))  # of both ways of a link
            if metric.over_micro_batches == "mean":
                value /= self.plans[layer]
            values[metric.name] = value
        return values


class LLEPMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, which also sums up what each layer's plans did.

    Megatron's report has what was recorded since its last one, and `read` what was recorded since
    its own last call. Neither takes anything from the other.
    """

    def __init__(self, metrics: dict[str, MetricEntry] | None = None):
        super().__init__()
        self._metrics = metrics or {}
        self._latest = _Recorded()
        """Not yet passed on to the two below, so that a forward adds to one."""
        self._unreported = _Recorded()
        self._unread = _Recorded()
        self._sharers: dist.ProcessGroup | None = None
        self.told: set[str] = set()
        """What a user was told at start-up. Megatron keeps the tracker as long as the process."""
        self.recorders: dict[str, Recorder] = {}
        """By folder; kept here as long."""
        self.times_reported = 0
        """By `report` and `read`."""

    def record_layer(self, layer: int, values: Mapping[str, float]) -> None:
        """Add one plan's metrics; `layer` counts from 0 over the whole model."""
        self._latest.add_plan(layer)
        for name, value in values.items():
            self._latest.add(layer, name, [value])

    def record_exchange(
        self, layer: int, sent: int, received: int, group: dist.ProcessGroup
    ) -> None:
        """Add the bytes of one exchange of lent experts among the ranks of the group."""
        self._latest.add(layer, "lent_link_mib", [sent / 2**20, received / 2**20])
        self._sharers = group

    def read_layer(self, layer: int) -> dict[str, float]:
        """A layer's metrics on this rank, over its micro-batches since the last report."""
        self._pass_on()
        return self._unreported.of_layer(layer)

    def report(self, loss_scale, iteration, writer=None, wandb_writer=None, **kwargs) -> str:
        """Report Megatron's metrics, then LLEP's; every rank must call it, as it reduces."""
        self._pass_on()
        self.times_reported += 1
        table = self._reduce(self._unreported, kwargs.get("pg_collection"))
        line = super().report(loss_scale, iteration, writer, wandb_writer, **kwargs)  # clears
        scalars = _name_values(table, per_layer=bool(kwargs.get("per_layer_logging")))
        for metric in METRICS if scalars else ():
            line += f" {metric.name}: {scalars[PREFIX + metric.name]:.2f} |"
        self._log_scalars(scalars, iteration, writer, wandb_writer)
        return line

    def read(
        self, pg_collection: ProcessGroupCollection | None, *, per_layer: bool
    ) -> dict[str, float]:
        """LLEP's metrics by the names under which they are logged, and forget them for `read`.

        Every rank must call it, as it reduces.
        """
        self._pass_on()
        self.times_reported += 1
        table = self._reduce(self._unread, pg_collection)
        self._unread = _Recorded()
        return _name_values(table, per_layer=per_layer)

    def clear(self) -> None:
        """Forget what was not reported, as Megatron does after evaluation; not for `read`."""
        super().clear()
        self._pass_on()
        self._unreported = _Recorded()

    def _pass_on(self) -> None:
        for each in (self._unreported, self._unread):
            each.add_all(self._latest)
        self._latest = _Recorded()

    def _reduce(
        self, recorded: _Recorded, pg_collection: ProcessGroupCollection | None
    ) -> np.ndarray:
        """[1 + K, L] of all ranks: whether there were plans in a layer, then the metrics.

        L is what ranks agree on, as the stages of a pipeline have different layers, and Megatron
        does not tell how many there are in a hybrid model.
        """
        stage, pipeline = _find_groups(pg_collection)
        count = _on_device(torch.tensor([1 + max(recorded.plans, default=-1)]))
        for group in (stage, pipeline):
            dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
        table = torch.zeros(1 + len(METRICS), int(count), dtype=torch.float64)
        if not table.numel():
            return table.numpy()
        for layer in recorded.plans:
            column = [1.0, *recorded.of_layer(layer).values()]
            table[:, layer] = torch.tensor(column, dtype=torch.float64)
        table = _on_device(table)
        if self._sharers is not None:  # on all of them or on none
            _reduce_rows(table, [metric.over_sharers for metric in METRICS], self._sharers, "max")
        for over in ("mean", "max"):
            _reduce_rows(table, [metric.over_ranks for metric in METRICS], stage, over)
        # A layer is in one stage.
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=pipeline)
        return table.cpu().numpy()


def install_tracker() -> LLEPMetricsTracker:
    """Put our tracker in the place of Megatron's; call it on every rank, with MoE layers or not."""
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, LLEPMetricsTracker):
        tracker = LLEPMetricsTracker(tracker.metrics)
        set_moe_metrics_tracker(tracker)
    return tracker


def number_in_model(layer_number: int, is_mtp_layer: bool, config: TransformerConfig) -> int:
    """A layer's number over the whole model, from 0; multi-token prediction layers last.

    Args:
        layer_number: from 1, as Megatron counts; multi-token prediction layers from 1 again.
        is_mtp_layer: whether this is such a layer.
        config: of the model.
    """
    return layer_number - 1 + is_mtp_layer * config.num_layers


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
    lent, before, after = (
        len(plan.transfers),
        load_before.tolist(),
        plan.load_per_rank_after.tolist(),
    )
    values = {
        "overload_factor_before": imbalance_of(before),
        "overload_factor_after": plan.imbalance_after,
        "max_tokens_before": max(before),
        "max_tokens_after": max(after),
        "lent_experts": lent,
        "lent_mib": lent * expert_bytes / 2**20,
        "foreign_mib": foreign_bytes / 2**20,
        "fallback_rate": float(after == before),
        "plan_ms": plan_seconds * 1e3,
    }
    tracker.record_layer(number_in_model(layer_number, is_mtp_layer, config), values)


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
        layer = number_in_model(layer_number, is_mtp_layer, config)
        tracker.record_exchange(layer, sent, received, group)


def _name_values(table: np.ndarray, *, per_layer: bool) -> dict[str, float]:
    """From [1 + K, L], see `_reduce`: a step's metrics, and each layer's; none if no layer ran."""
    layers = np.flatnonzero(table[0])
    scalars: dict[str, float] = {}
    for metric, values in zip(METRICS, table[1:, layers], strict=True):
        if len(layers) == 0:
            break
        scalars[PREFIX + metric.name] = float(metric.across_layers(values))
        if per_layer:
            for layer, value in zip(layers, values, strict=True):
                scalars[f"{PREFIX}{metric.name}_layer_{layer}"] = float(value)
    return scalars


def _find_groups(
    pg_collection: ProcessGroupCollection | None,
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of this pipeline stage, and those of this pipeline: together, all of the model."""
    stage = getattr(pg_collection, "tp_dp_cp", None)
    if stage is None:
        stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    pipeline = getattr(pg_collection, "pp", None)
    if pipeline is None:
        pipeline = parallel_state.get_pipeline_model_parallel_group()
    return stage, pipeline


def _reduce_rows(
    table: torch.Tensor, ways: Sequence[Over], group: dist.ProcessGroup, over: Over
) -> None:
    """Reduce, over a group, the rows [1 + K, L] of the metrics that are to be in this way."""
    rows = [row for row, way in enumerate(ways, start=1) if way == over]
    part = table[rows]
    if over == "max":
        dist.all_reduce(part, op=dist.ReduceOp.MAX, group=group)
    else:
        dist.all_reduce(part, group=group)
        part /= dist.get_world_size(group)
    table[rows] = part


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cuda() if torch.cuda.is_available() else tensor
