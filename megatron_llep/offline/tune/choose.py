"""Of replayed settings the best, the next, and whether to switch on at all.

Shape letters: N layers of all micro-batches, B micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_llep.config import LLEPConfig
from megatron_llep.offline.tune.replay import Replayer, drop_threshold
from megatron_llep.offline.tune.sample import Sample
from megatron_llep.offline.tune.search import Scored
from megatron_llep.planner.cost.model import LayerCost

MARGIN = 0.05
"""Part of a step by which a gain must exceed nothing: what the cost model may be off by."""
MOST_SLOWER = 0.25
"""Share of micro-batches that may be slower."""
EDGES = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, float("inf"))
"""Imbalances between which layers are looked at by themselves."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """One setting on all micro-batches that were replayed."""

    setting: LLEPConfig
    seconds: float
    """Of a micro-batch, mean."""
    gains: np.ndarray
    """float [B], plain expert parallelism's time of a micro-batch / this one's."""
    lent: float
    """Experts lent in a layer, mean."""
    foreign: int
    """Most foreign experts on a rank, in any layer."""
    foreign_bytes: int
    """Most that foreign weights and gradients take on a rank, for one micro-batch in flight."""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the gains: a quarter is below the first, half below the second."""
        low, middle, high = np.quantile(self.gains, (0.25, 0.5, 0.75)).tolist()
        return low, middle, high

    @property
    def slower(self) -> float:
        """Share of micro-batches that are slower than with plain expert parallelism."""
        return float((self.gains < 1).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Band:
    """Layers of like imbalance, under the best setting."""

    low: float
    high: float
    share: float
    """Of all layers."""
    gain: float
    """Their time under plain expert parallelism / under the setting, without the rest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What to set, what comes next, and why to leave it off, if so."""

    plain_seconds: float
    """Of a micro-batch, mean."""
    best: Outcome
    runner_up: Outcome | None
    """The next best that differs in more than its threshold; None if all take the same time."""
    by_planner: list[Outcome]
    """The best of each other planner, best first."""
    bands: list[Band]
    reasons: list[str]
    """Why to leave it off; none: switch on."""

    @property
    def switch_on(self) -> bool:
        """The verdict."""
        return not self.reasons


def choose(
    scored: Sequence[Scored],
    replayer: Replayer,
    sample: Sample,
    cost: LayerCost,
    *,
    others: np.ndarray | None = None,
    margin: float = MARGIN,
) -> Choice:
    """Choose by the time of all micro-batches together.

    Args:
        scored: best first, as `search` gives them.
        replayer: that they were replayed with.
        sample: what was replayed.
        cost: machine and layer.
        others: seconds [B] of the rest of the model in each micro-batch; None: it is left out.
        margin: the part of a step that a gain must exceed.
    """
    others = np.zeros(sample.num_batches) if others is None else others
    plain = sample.sum_by_batch(replayer.plain) + others

    def summarise(each: Scored) -> Outcome:
        replay = each.replay
        took = sample.sum_by_batch(replay.seconds) + others
        return Outcome(
            setting=each.setting,
            seconds=float(took.mean()),
            gains=plain / took,
            lent=float(replay.lent.mean()),
            foreign=int(replay.foreign.max()),
            foreign_bytes=_count_bytes(replay.foreign, sample, cost),
        )

    first = scored[0]
    unlike = (
        each
        for each in scored
        if drop_threshold(each.setting) != drop_threshold(first.setting)
        and not np.array_equal(each.replay.seconds, first.replay.seconds)
    )
    second = next(unlike, None)
    planners = {first.setting.planner: first}
    for each in scored:
        planners.setdefault(each.setting.planner, each)
    best = summarise(first)
    planning = cost.model.planning_seconds * float((first.replay.lent > 0).sum())
    return Choice(
        plain_seconds=float(plain.mean()),
        best=best,
        runner_up=None if second is None else summarise(second),
        by_planner=[summarise(each) for each in planners.values() if each is not first],
        bands=_split_bands(replayer, first),
        reasons=find_reasons(
            best,
            plain_seconds=float(plain.mean()),
            planning_seconds=planning / sample.num_batches,
            margin=margin,
        ),
    )


def find_reasons(
    best: Outcome, *, plain_seconds: float, planning_seconds: float, margin: float
) -> list[str]:
    """Why even the best setting is not worth switching on; none if it is.

    Args:
        best: the setting.
        plain_seconds: of a micro-batch, mean, under plain expert parallelism.
        planning_seconds: what planning is predicted to take in a micro-batch.
        margin: see `choose`.
    """
    reasons = []
    median = best.quartiles[1]
    if median < 1 + margin:
        reasons.append(
            f"the median micro-batch gains {median - 1:.1%}, and a prediction may be off by "
            f"{margin:.0%}"
        )
    saved = plain_seconds - best.seconds
    if saved <= planning_seconds and planning_seconds:
        reasons.append(
            f"{saved * 1e3:.3g} ms are saved in a micro-batch, and planning, which is in them, "
            f"may take {planning_seconds * 1e3:.3g} ms more than predicted"
        )
    if best.slower > MOST_SLOWER:
        reasons.append(
            f"{best.slower:.0%} of the micro-batches are slower, more than {MOST_SLOWER:.0%}"
        )
    return reasons


def _count_bytes(foreign: np.ndarray, sample: Sample, cost: LayerCost) -> int:
    """Weights of all layers of a micro-batch, fetched again of one layer; gradients of one."""
    shape, most = cost.shape, int(foreign.max())
    slots = float(most)
    if not shape.refetch:
        slots = float(sample.sum_by_batch(foreign).max())
    return round(slots * shape.expert_bytes + most * shape.gradient_bytes)


def _split_bands(replayer: Replayer, best: Scored) -> list[Band]:
    bands = []
    for low, high in pairwise(EDGES):
        inside = (replayer.imbalance >= low) & (replayer.imbalance < high)
        if inside.any():
            bands.append(
                Band(
                    low=low,
                    high=high,
                    share=float(inside.mean()),
                    gain=float(replayer.plain[inside].sum() / best.replay.seconds[inside].sum()),
                )
            )
    return bands
