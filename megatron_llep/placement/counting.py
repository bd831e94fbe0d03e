"""The count table on its way to the host: what a rank must know before it can plan.

Letters: T tokens of this rank, E experts, R sources (ranks that share tokens, and their
expert-tensor-parallel ranks), L layers.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_llep.placement.rank_note import Notes, RankNote

ASTRAY = -1
"""In the place of a number of layers: what a rank foretold of a layer was not so."""


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What every rank knows of all of them, of a layer that has not run yet."""

    counts: np.ndarray
    """int64 [R, E], tokens from each source to each expert."""
    notes: Notes
    """What the sources said beside."""


@dataclass(frozen=True, kw_only=True)
class Counted(Foretold):
    """What every rank knows of all of them."""

    marks: list[int]
    """[R], the forward that each source is in, as a number."""
    last_plans: list[int]
    """[R], digest of the plans that each source made since the count before this."""
    known_ahead: list[int]
    """[R], layers behind this one whose counts each source knows, or ASTRAY."""


class GatheredRows:
    """A tensor of every source: gathered and copied while host and GPU do other things.

    All ranks of the group make one in the same order.
    """

    def __init__(
        self, mine: torch.Tensor, *, group: dist.ProcessGroup, stream: torch.cuda.Stream
    ) -> None:
        """Start the all-gather, and behind it the copy; neither holds up the host or its stream.

        Args:
            mine: of this source; of the same shape on all.
            group: the R sources.
            stream: for the copy, and to wait for the all-gather.
        """
        self._shape = (dist.get_world_size(group), *mine.shape)
        self._rows = mine.new_empty(self._shape[0] * mine.numel())
        row = mine.flatten()
        self._work = dist.all_gather_into_tensor(self._rows, row, group=group, async_op=True)
        self._copied: torch.cuda.Event | None = None
        if not mine.is_cuda:
            return
        with torch.cuda.stream(stream):
            self._work.wait()  # NCCL: the stream waits, the host does not
            self._host = torch.empty_like(self._rows, device="cpu", pin_memory=True)
            self._host.copy_(self._rows, non_blocking=True)
            self._copied = stream.record_event()
        for tensor in (row, self._rows):
            tensor.record_stream(stream)

    def wait(self) -> np.ndarray:
        """[R, ...]. Waits on the host: the only point of a forward at which it does for the GPU."""
        if self._copied is None:
            self._work.wait()
            return self._rows.numpy().reshape(self._shape)
        self._copied.synchronize()
        return self._host.numpy().reshape(self._shape)


class CountTable:
    """Every source's tokens per expert."""

    def __init__(
        self,
        routing_map: torch.Tensor,
        *,
        note: RankNote,
        mark: int,
        last_plan: int,
        known_ahead: torch.Tensor | int = 0,
        group: dist.ProcessGroup,
        stream: torch.cuda.Stream,
    ):
        """Start to gather, as `GatheredRows`.

        Args:
            routing_map: bool [T, E].
            note: what this rank says beside.
            mark: the forward that this rank is in, as a number of 63 bits.
            last_plan: digest of the plans that this rank made since its last count, 64 bits.
            known_ahead: layers behind this one whose counts this rank knows, or ASTRAY; int64 [1]
                where the host does not know it.
            group: the R sources.
            stream: as for `GatheredRows`.
        """
        counts = routing_map.sum(dim=0, dtype=torch.int64)
        said = [counts.new_full((1,), each) for each in (note.encode(), mark, last_plan)]
        if not isinstance(known_ahead, torch.Tensor):
            known_ahead = counts.new_full((1,), known_ahead)
        row = torch.cat((counts, *said, known_ahead))
        self._rows = GatheredRows(row, group=group, stream=stream)

    def wait(self) -> Counted:
        """Wait on the host."""
        rows = self._rows.wait()
        return Counted(
            counts=rows[:, :-4].copy(),
            notes=Notes.decode(rows[:, -4]),
            marks=rows[:, -3].tolist(),
            last_plans=rows[:, -2].tolist(),
            known_ahead=rows[:, -1].tolist(),
        )


class ForetoldTable:
    """Every source's tokens per expert, of layers that have not run yet."""

    def __init__(
        self,
        counts: torch.Tensor,
        notes: list[RankNote],
        *,
        group: dist.ProcessGroup,
        stream: torch.cuda.Stream,
    ):
        """Start to gather, as `GatheredRows`.

        Args:
            counts: int64 [L, E]; 0 of layers that this rank knows nothing of.
            notes: what it says beside, of those it knows.
            group: the R sources.
            stream: as for `GatheredRows`.
        """
        said = torch.tensor([note.encode() for note in notes] + [0] * (len(counts) - len(notes)))
        said = said.pin_memory() if counts.is_cuda else said
        column = said.to(counts.device, non_blocking=True).unsqueeze(1)
        self._rows = GatheredRows(torch.cat((counts, column), 1), group=group, stream=stream)

    def wait(self) -> list[Foretold]:
        """Wait on the host: of L layers, as far as all ranks know them."""
        rows = self._rows.wait().swapaxes(0, 1)
        return [
            Foretold(counts=layer[:, :-1].copy(), notes=Notes.decode(layer[:, -1]))
            for layer in rows
        ]
