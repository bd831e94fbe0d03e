"""The count table on its way to the host: what a rank must know before it can plan.

Letters: T tokens of this rank, E experts, R sources (ranks that share tokens, and their
expert-tensor-parallel ranks).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_llep.placement.rank_note import Notes, RankNote


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What every rank knows of all of them."""

    counts: np.ndarray
    """int64 [R, E], tokens from each source to each expert."""
    notes: Notes
    """What the sources said beside."""
    marks: list[int]
    """[R], the forward that each source is in, as a number."""
    last_plans: list[int]
    """[R], digest of the plan that each source made before this count."""


class CountTable:
    """Every source's tokens per expert: gathered and copied while host and GPU do other things.

    All ranks of the group make one in the same order.
    """

    def __init__(
        self,
        routing_map: torch.Tensor,
        *,
        note: RankNote,
        mark: int,
        last_plan: int,
        group: dist.ProcessGroup,
        stream: torch.cuda.Stream,
    ):
        """Start the all-gather, and behind it the copy; neither holds up the host or its stream.

        Args:
            routing_map: bool [T, E].
            note: what this rank says beside.
            mark: the forward that this rank is in, as a number of 63 bits.
            last_plan: digest of the plan that this rank made last, 64 bits.
            group: the R sources.
            stream: for the copy, and to wait for the all-gather.
        """
        counts = routing_map.sum(dim=0, dtype=torch.int64)
        said = (note.encode(), mark, last_plan)
        row = torch.cat((counts, *(counts.new_full((1,), number) for number in said)))
        self._rows = row.new_empty(dist.get_world_size(group) * row.numel())
        self._shape = (-1, row.numel())
        self._work = dist.all_gather_into_tensor(self._rows, row, group=group, async_op=True)
        self._copied: torch.cuda.Event | None = None
        if not routing_map.is_cuda:
            return
        with torch.cuda.stream(stream):
            self._work.wait()  # NCCL: the stream waits, the host does not
            self._host = torch.empty_like(self._rows, device="cpu", pin_memory=True)
            self._host.copy_(self._rows, non_blocking=True)
            self._copied = stream.record_event()
        for tensor in (row, self._rows):
            tensor.record_stream(stream)

    def wait(self) -> Counted:
        """Wait on the host.

        The only point of a layer's forward at which the host waits for the GPU.
        """
        if self._copied is None:
            self._work.wait()
            table = self._rows
        else:
            self._copied.synchronize()
            table = self._host
        rows = table.numpy().reshape(self._shape)
        return Counted(
            counts=rows[:, :-3].copy(),
            notes=Notes.decode(rows[:, -3]),
            marks=rows[:, -2].tolist(),
            last_plans=rows[:, -1].tolist(),
        )
