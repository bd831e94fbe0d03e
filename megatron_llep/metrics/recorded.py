"""What layers recorded on this rank since the last report.

Letters: E experts, O rows of an outlook (`observe.outlook`).
"""

from collections.abc import Mapping
from operator import add

import numpy as np

from megatron_llep.metrics.names import METRICS

_MAXIMA = frozenset(metric.name for metric in METRICS if metric.over_micro_batches == "max")


class Recorded:
    """By layer of the whole model, from 0."""

    def __init__(self) -> None:
        self.micro_batches: dict[int, int] = {}
        self.lending: set[int] = set()
        """Layers that LLEP planned; plain expert parallelism ran in the others."""
        self.outlook: dict[int, np.ndarray] = {}
        """[O] sums of what this rank planned ahead."""
        self._experts: dict[int, np.ndarray] = {}
        self._values: dict[int, dict[str, list[float]]] = {}

    def add_micro_batch(
        self,
        layer: int,
        values: Mapping[str, float],
        *,
        experts: np.ndarray | None = None,
        lends: bool = True,
    ) -> None:
        """Add what is known of one.

        Args:
            layer: from 0.
            values: metrics by name.
            experts: [E] tokens of each, of one expert-parallel group; None if not known.
            lends: whether LLEP planned.
        """
        self.micro_batches[layer] = self.micro_batches.get(layer, 0) + 1
        if lends:
            self.lending.add(layer)
        for name, value in values.items():
            self.add(layer, name, [value])
        if experts is not None:
            self._add_experts(layer, experts)

    def _add_experts(self, layer: int, experts: np.ndarray) -> None:
        """Of models with fewer experts, trained in the same process, the others had none."""
        known = self._experts.get(layer, experts[:0])
        total = np.zeros(max(len(known), len(experts)))
        for each in (known, experts):
            total[: len(each)] += each
        self._experts[layer] = total

    def add(self, layer: int, name: str, values: list[float]) -> None:
        """Add numbers to a metric, or keep the largest of each."""
        recorded = self._values.setdefault(layer, {})
        if name in recorded:
            join = max if name in _MAXIMA else add
            values = list(map(join, recorded[name], values))
        recorded[name] = values

    def add_outlook(self, layer: int, sums: np.ndarray) -> None:
        """Add [O] numbers of a micro-batch that was planned ahead."""
        self.outlook[layer] = self.outlook.get(layer, 0) + sums

    def add_all(self, other: "Recorded") -> None:
        """Add what another holds."""
        self.lending |= other.lending
        for layer, count in other.micro_batches.items():
            self.micro_batches[layer] = self.micro_batches.get(layer, 0) + count
        for layer, recorded in other._values.items():
            for name, values in recorded.items():
                self.add(layer, name, values)
        for layer, experts in other._experts.items():
            self._add_experts(layer, experts)
        for layer, sums in other.outlook.items():
            self.add_outlook(layer, sums)

    @property
    def num_layers(self) -> int:
        """As far as this rank knows: its last layer's number, plus 1."""
        return 1 + max(self.micro_batches, default=-1)

    @property
    def num_experts(self) -> int:
        """E; 0 where the experts' tokens are not known."""
        return max(map(len, self._experts.values()), default=0)

    def of_layer(self, layer: int) -> dict[str, float]:
        """A layer's metrics, over its micro-batches."""
        values = {}
        for metric in METRICS:
            value = max(self._values[layer].get(metric.name, [0.0]))  # of both ways of a link
            if metric.over_micro_batches == "mean":
                value /= self.micro_batches[layer]
            values[metric.name] = value
        return values

    def experts_of_layer(self, layer: int) -> np.ndarray | None:
        """[E] tokens of a layer's experts, mean over its micro-batches; None if not known."""
        experts = self._experts.get(layer)
        return None if experts is None else experts / self.micro_batches[layer]
