"""What is logged, under which name; `docs/metrics.md` is the table of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

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

OF_PLAIN = ("overload_factor_before", "max_tokens_before")
"""Of these what is known where plain expert parallelism runs and is observed."""

PERCENTILES = (50, 75, 90, 95)
"""Over layers, of what follows; the largest has the name without a suffix."""
SPREAD = ("overload_factor_before", "overload_factor_after")


@dataclass(frozen=True, kw_only=True)
class ExpertMetric:
    """Of the tokens [E] that a layer's experts have, and how one of all layers comes of it."""

    name: str
    help: str
    of_layer: Callable[[np.ndarray], np.floating]
    across_layers: Callable[[np.ndarray], np.floating]


EXPERT_METRICS = (
    ExpertMetric(
        name="expert_tokens_min",
        help="tokens of the least busy expert; least of all layers",
        of_layer=np.min,
        across_layers=np.min,
    ),
    ExpertMetric(
        name="expert_tokens_max",
        help="tokens of the busiest expert; most of all layers",
        of_layer=np.max,
        across_layers=np.max,
    ),
    ExpertMetric(
        name="expert_tokens_std",
        help="standard deviation of the tokens over a layer's experts; worst layer",
        of_layer=np.std,
        across_layers=np.max,
    ),
    ExpertMetric(
        name="idle_experts",
        help="share of a layer's experts that had no token; mean over layers",
        of_layer=lambda tokens: np.mean(tokens == 0),
        across_layers=np.mean,
    ),
)
BUSIEST = 3
"""Experts that are named."""
