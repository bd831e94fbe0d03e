"""What all layers of a model share for lending: process groups, and a count of the memory."""

import torch.distributed as dist

from megatron_llep.lending.memory import ForeignMemory


class SharedLending:
    """Made once a model; every layer gets the same one."""

    def __init__(self) -> None:
        self.memory = ForeignMemory()
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def group_like(self, ep_group: dist.ProcessGroup) -> dist.ProcessGroup:
        """A group of its own with the ranks of `ep_group`, so that weights travel while tokens do.

        The ranks of the group call this in the same order.
        """
        ranks = tuple(dist.get_process_group_ranks(ep_group))
        if ranks not in self._groups:
            self._groups[ranks] = dist.new_group(
                list(ranks), use_local_synchronization=True, group_desc="LLEP_LENDING"
            )
        return self._groups[ranks]
