"""What follows from gathered counts: loads of plain expert parallelism, and plans that might be.

Letters: P ranks that share tokens, E experts, M = E / P of them native to each, R sources, O rows
of an outlook, N layers and micro-batches.
"""

from collections.abc import Iterator

import numpy as np
import torch.distributed as dist

from megatron_llep.observe.counts import Gathered
from megatron_llep.observe.outlook import choose_evenly
from megatron_llep.planner import imbalance_of

PLANNED_PER_RANK = 2
"""Layers and micro-batches of one gathering that a rank plans ahead; sharers divide them."""


def measure_plain(counts: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of plain expert parallelism by name, and the experts' tokens [E]; of [P, E]."""
    experts = counts.sum(axis=0)
    load = experts.reshape(len(counts), -1).sum(axis=1).tolist()
    return {"overload_factor_before": imbalance_of(load), "max_tokens_before": max(load)}, experts


def look_ahead(gathered: Gathered) -> Iterator[tuple[int, np.ndarray]]:
    """This rank's part of what is planned ahead: numbers in `gathered.seen`, and [O] of each.

    All sharers choose alike: all of them, or so many evenly spread over layers and micro-batches.
    """
    sharers = gathered.sharers
    if sharers.num_ranks == 1:
        return  # nobody to lend to
    num_sources = dist.get_world_size(sharers.group)
    chosen = choose_evenly(len(gathered.seen), PLANNED_PER_RANK * num_sources)
    for number in chosen[dist.get_rank(sharers.group) :: num_sources]:
        yield number, sharers.outlook.look(gathered.seen[number].counts, num_sources)
