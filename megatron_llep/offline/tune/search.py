"""Which of many settings is best, without replaying all layers under all of them.

Successive halving: all settings on a few layers, the better ones on more, few on all. Layers of a
beginning are among those that follow, and spread evenly over micro-batches and layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llep.config import LLEPConfig
from megatron_llep.offline.tune.replay import Replay, Replayer, drop_threshold
from megatron_llep.offline.tune.sample import spread_order
from megatron_llep.offline.tune.settings import count_flags

STAGES = (1 / 16, 1 / 4, 1)
"""Parts of the layers."""
KEPT = 1 / 4
"""Of the planners' variants, from stage to stage, and in any case the best of each planner."""
LEAST_ROWS = 64
"""Layers of the first stage; of so few more settings might look alike than are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A setting that was replayed on all layers."""

    setting: LLEPConfig
    replay: Replay

    @property
    def total(self) -> float:
        """Seconds of all layers."""
        return float(self.replay.seconds.sum())


def search(
    replayer: Replayer,
    grid: Sequence[LLEPConfig],
    advance: Callable[[], None] = lambda: None,
    *,
    stages: Sequence[float] = STAGES,
) -> list[Scored]:
    """Those that were replayed on all layers, best first; among equals the one with fewer flags.

    Args:
        replayer: of the layers.
        grid: what to try; settings that differ in their threshold alone share their plans.
        advance: called for each group of settings that was replayed on some layers, for a
            progress bar: each group once, and those that are kept again.
        stages: parts of the layers, ascending, the last one 1.
    """
    N = replayer.num_layers
    order = spread_order(N)
    alive: dict[LLEPConfig, list[LLEPConfig]] = {}
    for setting in grid:
        alive.setdefault(drop_threshold(setting), []).append(setting)
    done: dict[LLEPConfig, list[Replay]] = {core: [] for core in alive}
    begin = 0
    ends = sorted({min(N, max(LEAST_ROWS, math.ceil(N * stage))) for stage in stages})
    for end in ends:
        rows = order[:end]
        for core in alive:
            done[core].append(replayer.run_planned(core, order[begin:end]))
            advance()
        begin = end
        if end == N:
            break
        scores = {
            core: min(_total(replayer, setting, done[core], rows) for setting in settings)
            for core, settings in alive.items()
        }
        alive = {core: alive[core] for core in _keep(scores)}
    back = np.argsort(order)
    scored = []
    for core, settings in alive.items():
        planned = _join(done[core])
        for setting in settings:
            replay = replayer.apply_threshold(setting, planned, order)
            scored.append(
                Scored(
                    setting=setting,
                    replay=Replay(**{k: v[back] for k, v in vars(replay).items()}),
                )
            )
    place = {setting: number for number, setting in enumerate(grid)}
    return sorted(
        scored, key=lambda s: (round(s.total * 1e9), count_flags(s.setting), place[s.setting])
    )


def _keep(scores: dict[LLEPConfig, float]) -> list[LLEPConfig]:
    """The better ones, in the order of the grid."""
    ranked = sorted(scores, key=scores.__getitem__)
    kept = set(ranked[: math.ceil(len(ranked) * KEPT)])
    for planner in {core.planner for core in scores}:
        kept.add(next(core for core in ranked if core.planner == planner))
    return [core for core in scores if core in kept]


def _total(replayer: Replayer, setting: LLEPConfig, done: list[Replay], rows: np.ndarray) -> float:
    return float(replayer.apply_threshold(setting, _join(done), rows).seconds.sum())


def _join(parts: list[Replay]) -> Replay:
    names = vars(parts[0])
    return Replay(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})
