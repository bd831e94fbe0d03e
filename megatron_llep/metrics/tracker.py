"""Megatron's tracker of MoE metrics, which also sums up what LLEP's layers, or hooks, recorded."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import (
    MetricEntry,
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)

from megatron_llep.metrics.console import format_line
from megatron_llep.metrics.recorded import Recorded
from megatron_llep.metrics.reduce import Reducer
from megatron_llep.metrics.summary import name_values
from megatron_llep.observe.counts import CountLog, Gathered
from megatron_llep.observe.look import look_ahead, measure_plain
from megatron_llep.observe.seen import SeenLayer

if TYPE_CHECKING:
    from megatron_llep.observe.recorder import Recorder

Reader = Literal["report", "read"]


class LLEPMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, which also sums up what each layer's plans did.

    Megatron's report has what was recorded since its last one, and `read` what was recorded since
    its own last call. Neither takes anything from the other.
    """

    def __init__(self, metrics: dict[str, MetricEntry] | None = None):
        super().__init__()
        self._metrics = metrics or {}
        self.counts = CountLog()
        """Of layers that are observed."""
        self.on_seen: list[Callable[[SeenLayer], None]] = []
        """Called with each layer and micro-batch that was observed, when a report or `read` has
        gathered it: on all ranks that share its tokens, in the order of layers, then of
        micro-batches."""
        self.machine = ""
        """Which machine predictions are for, in words; empty where there are none."""
        self.reducer = Reducer()
        self._latest = Recorded()
        """Not yet passed on to the two below, so that a forward adds to one."""
        self._since: dict[Reader, Recorded] = {"report": Recorded(), "read": Recorded()}
        self.told: set[str] = set()
        """What a user was told at start-up. Megatron keeps the tracker as long as the process."""
        self.recorders: dict[str, Recorder] = {}
        """By folder; kept here as long."""
        self.times_reported = 0
        """By `report` and `read`."""

    def record_layer(
        self, layer: int, values: Mapping[str, float], *, experts: np.ndarray | None = None
    ) -> None:
        """Add one plan's metrics; `layer` counts from 0 over the whole model.

        Args:
            layer: likewise.
            values: by name.
            experts: [E] tokens of each expert, of one expert-parallel group.
        """
        self._latest.add_micro_batch(layer, values, experts=experts)

    def record_exchange(
        self, layer: int, sent: int, received: int, group: dist.ProcessGroup
    ) -> None:
        """Add the bytes of one exchange of lent experts among the ranks of the group."""
        self._latest.add(layer, "lent_link_mib", [sent / 2**20, received / 2**20])
        self.reducer.sharers = group

    def read_layer(self, layer: int) -> dict[str, float]:
        """A layer's metrics on this rank, over its micro-batches since the last report."""
        self._pass_on()
        return self._since["report"].of_layer(layer)

    def report(self, loss_scale, iteration, writer=None, wandb_writer=None, **kwargs) -> str:
        """Report Megatron's metrics, then LLEP's; every rank must call it, as it reduces."""
        per_layer = bool(kwargs.get("per_layer_logging"))
        scalars = self._put_together("report", kwargs.get("pg_collection"), per_layer)
        line = super().report(loss_scale, iteration, writer, wandb_writer, **kwargs)  # clears
        self._log_scalars(scalars, iteration, writer, wandb_writer)
        return line + format_line(scalars, self.machine)

    def read(
        self, pg_collection: ProcessGroupCollection | None, *, per_layer: bool
    ) -> dict[str, float]:
        """LLEP's metrics by the names under which they are logged, and forget them for `read`.

        Every rank must call it, as it reduces.
        """
        scalars = self._put_together("read", pg_collection, per_layer)
        self._since["read"] = Recorded()
        return scalars

    def clear(self) -> None:
        """Forget what was not reported, as Megatron does after evaluation; not for `read`."""
        super().clear()
        self.counts.forget()
        self._pass_on()
        self._since["report"] = Recorded()

    def _put_together(
        self, reader: Reader, pg_collection: ProcessGroupCollection | None, per_layer: bool
    ) -> dict[str, float]:
        self._pass_on()
        self.times_reported += 1
        for gathered in self.counts.gather():
            self._record_seen(gathered)
        reduced = self.reducer.reduce(self._since[reader], pg_collection)
        return name_values(reduced, per_layer=per_layer)

    def _pass_on(self) -> None:
        for each in self._since.values():
            each.add_all(self._latest)
        self._latest = Recorded()

    def _record_seen(self, gathered: Gathered) -> None:
        """Record what was observed, tell it to listeners, and plan a part of it ahead."""
        to_read = [self._since["read"]]
        to_both = list(self._since.values())
        for seen, is_new in zip(gathered.seen, gathered.is_new, strict=True):
            values, experts = measure_plain(seen.counts)
            for recorded in to_both if is_new else to_read:
                recorded.add_micro_batch(seen.layer, values, experts=experts, lends=False)
            for listener in self.on_seen:
                listener(seen)
        for number, sums in look_ahead(gathered):
            layer = gathered.seen[number].layer
            for recorded in to_both if gathered.is_new[number] else to_read:
                recorded.add_outlook(layer, sums)


def install_tracker() -> LLEPMetricsTracker:
    """Put our tracker in the place of Megatron's; call it on every rank, with MoE layers or not."""
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, LLEPMetricsTracker):
        tracker = LLEPMetricsTracker(tracker.metrics)
        set_moe_metrics_tracker(tracker)
    return tracker
