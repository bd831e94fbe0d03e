"""Counts of routing, kept on the device until a report gathers them.

Letters: P ranks that share tokens, E experts, R sources (these ranks, and their
expert-tensor-parallel ranks), N layers and micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_llep.observe.outlook import Outlook
from megatron_llep.observe.seen import SeenLayer

MOST_KEPT = 256
"""Micro-batches of a layer that are kept. Of more every second is dropped, of more again three of
four, and so on: nobody may ever ask for a report."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sharers:
    """Ranks whose tokens meet in a layer's experts."""

    group: dist.ProcessGroup
    """The R sources, expert-parallel major."""
    num_ranks: int
    """P."""
    outlook: Outlook

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sharers":
        """Itself: a process group has no copy."""
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class Gathered:
    """What all sharers know of N layers and micro-batches, in the order of the layers."""

    sharers: Sharers
    seen: list[SeenLayer]
    is_new: list[bool]
    """Of each, whether Megatron's report has not been told to forget it."""


class KeptCounts:
    """Of one layer on this rank."""

    def __init__(self) -> None:
        self.counts: list[torch.Tensor] = []
        """int32 [E] each, of the micro-batches 0, stride, 2 * stride, ..."""
        self.stride = 1
        self.num_forgotten = 0
        """Of the first ones, that Megatron's report was told to forget."""
        self._number = 0

    def add(self, counts: torch.Tensor) -> None:
        """Keep the next micro-batch, or drop it."""
        if self._number % self.stride == 0:
            if len(self.counts) == MOST_KEPT:
                self.counts = self.counts[::2]
                self.num_forgotten = (self.num_forgotten + 1) // 2
                self.stride *= 2
            if self._number % self.stride == 0:
                self.counts.append(counts)
        self._number += 1

    def forget(self) -> None:
        """Let Megatron's report leave out what is here."""
        self.num_forgotten = len(self.counts)


class CountLog:
    """Counts of all layers on this rank since the last gathering."""

    def __init__(self) -> None:
        # By the name of their group and by E: chunks of a model may each have their own sharers.
        self._kept: dict[tuple[str, int], tuple[Sharers, dict[int, KeptCounts]]] = {}

    def add(self, sharers: Sharers, layer: int, counts: torch.Tensor) -> None:
        """Keep a micro-batch's counts, int32 [E], of a layer; nothing is waited for."""
        key = (sharers.group.group_name, len(counts))
        _, layers = self._kept.setdefault(key, (sharers, {}))
        layers.setdefault(layer, KeptCounts()).add(counts)

    def forget(self) -> None:
        """Let Megatron's report leave out what is here."""
        for _, layers in self._kept.values():
            for kept in layers.values():
                kept.forget()

    def gather(self) -> Iterator[Gathered]:
        """Put the sharers' counts together, in one collective, and begin anew.

        All sharers call it, after as many forwards each.
        """
        everything, self._kept = self._kept, {}
        for sharers, layers in everything.values():
            mine = torch.stack([each for n in sorted(layers) for each in layers[n].counts])
            num_sources = dist.get_world_size(sharers.group)
            rows = mine.new_empty(num_sources * mine.numel())
            dist.all_gather_into_tensor(rows, mine.view(-1), group=sharers.group)
            table = rows.cpu().numpy().astype(np.int64)  # the only wait for the device
            by_rank = table.reshape(sharers.num_ranks, -1, *mine.shape).sum(axis=1)  # [P, N, E]
            numbers = [
                (layer, k * kept.stride, k >= kept.num_forgotten)
                for layer, kept in sorted(layers.items())
                for k in range(len(kept.counts))
            ]
            yield Gathered(
                sharers=sharers,
                seen=[
                    SeenLayer(layer=layer, micro_batch=number, counts=by_rank[:, row].copy())
                    for row, (layer, number, _) in enumerate(numbers)
                ],
                is_new=[is_new for *_, is_new in numbers],
            )
