"""Numbers by name, of what all ranks know.

Letters: K metrics, L layers of the whole model, n of them that ran, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_llep.metrics.names import (
    BUSIEST,
    EXPERT_METRICS,
    METRICS,
    OF_PLAIN,
    PERCENTILES,
    PREFIX,
    SPREAD,
)
from megatron_llep.metrics.reduce import Reduced
from megatron_llep.observe.outlook import summarise_outlook


@dataclass(frozen=True, kw_only=True)
class BusyExpert:
    """One of the experts with most tokens, compared with its layer's mean."""

    layer: int
    """From 0 over the whole model."""
    expert: int
    """From 0."""
    factor: float
    """Its tokens / the mean of its layer's experts."""


def name_values(reduced: Reduced | None, *, per_layer: bool) -> dict[str, float]:
    """A step's metrics, and each layer's, under the names of `docs/metrics.md`; none if none ran.

    Args:
        reduced: of all ranks.
        per_layer: whether to add each layer's.
    """
    if reduced is None:
        return {}
    layers = np.flatnonzero(reduced.ran).tolist()
    scalars: dict[str, float] = {}

    def add(name: str, values: np.ndarray, total: np.floating) -> None:
        """Values [n] of the layers that ran."""
        scalars[PREFIX + name] = float(total)
        for layer, value in zip(layers, values, strict=True) if per_layer else ():
            scalars[f"{PREFIX}{name}_layer_{layer}"] = float(value)

    spread = {}
    for metric, row in zip(METRICS, reduced.metrics, strict=True):
        if reduced.lends or metric.name in OF_PLAIN:
            values = row[layers]
            add(metric.name, values, metric.across_layers(values))
            if metric.name in SPREAD:
                spread[metric.name] = values
    if len(reduced.experts) == 0:
        return scalars
    for name, values in spread.items():
        for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
            scalars[f"{PREFIX}{name}_p{percent}"] = float(value)
    for each in EXPERT_METRICS:
        values = np.array([each.of_layer(reduced.experts[:, layer]) for layer in layers])
        add(each.name, values, each.across_layers(values))
    for place, busy in enumerate(find_busiest(reduced), start=1):
        for name, number in vars(busy).items():
            scalars[f"{PREFIX}busiest_{place}_{name}"] = float(number)
    for name, number in summarise_outlook(
        reduced.outlook, num_layers=len(layers), other_seconds=reduced.other_seconds
    ).items():
        scalars[PREFIX + name] = number
    return scalars


def find_busiest(reduced: Reduced, most: int = BUSIEST) -> Iterator[BusyExpert]:
    """The experts with most tokens for their layer; of equals the first layer's first."""
    total = reduced.experts.sum(axis=0)  # [L]
    factors = reduced.experts * len(reduced.experts) / np.maximum(total, 1e-300)
    ranked = np.argsort(-factors.T.ravel(), kind="stable")[:most].tolist()
    for layer, expert in (divmod(each, len(reduced.experts)) for each in ranked):
        if factors[expert, layer] > 0:
            yield BusyExpert(layer=layer, expert=expert, factor=float(factors[expert, layer]))
