"""What all layers of a model share: process groups for lending, a count of the memory, progress."""

from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_llep.lending.memory import ForeignMemory
from megatron_llep.progress import Progress


class SharedLending:
    """Made once a model; every layer gets the same one."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.memory = ForeignMemory()
        self.progress = progress or Progress()
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def group_like(self, ep_group: dist.ProcessGroup) -> dist.ProcessGroup:
        """A group of its own with the ranks of `ep_group`, so that weights travel while tokens do.

        It has the time-out of `ep_group`, and Megatron's list of groups holds it, so that a later
        change of all time-outs reaches it. The ranks of the group call this in the same order.
        """
        ranks = tuple(dist.get_process_group_ranks(ep_group))
        if ranks not in self._groups:
            self._groups[ranks] = parallel_state.create_group(
                list(ranks),
                timeout=_get_timeout(ep_group),
                use_local_synchronization=True,
                group_desc="LLEP_LENDING",
            )
        return self._groups[ranks]


def _get_timeout(group: dist.ProcessGroup) -> timedelta:
    # Torch has no public way to read it.
    return group._get_backend(group._device_types[0]).options._timeout
