"""What all layers of a model share: groups, a stream and a slab of memory for lending, progress.

Letters: D replicas of every expert, P ranks of one expert-parallel group.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llep.lending.grad_scratch import GradScratch
from megatron_llep.lending.memory import ForeignMemory
from megatron_llep.lending.progress import Progress
from megatron_llep.lending.side_stream import SideStream


class SharedLending:
    """Made once a model; every layer gets the same one."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.memory = ForeignMemory()
        self.grad_scratch = GradScratch()
        self.lends = True
        """Whether this rank agrees to lend; all ranks learn it with the counts."""
        self.progress = progress or Progress()
        self._streams: dict[torch.device, SideStream] = {}
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        self._joined: dict[tuple[int, ...], ProcessGroupCollection] = {}

    def stream_on(self, device: torch.device) -> SideStream:
        """The stream on which the experts of a device travel."""
        if device not in self._streams:
            self._streams[device] = SideStream(device)
        return self._streams[device]

    def group_like(self, ep_group: dist.ProcessGroup) -> dist.ProcessGroup:
        """A group of its own with the ranks of `ep_group`, so that weights travel while tokens do.

        The ranks of the group call this in the same order.
        """
        return self._make_group(dist.get_process_group_ranks(ep_group), ep_group, "LLEP_LENDING")

    def join_replicas(self, pg_collection: ProcessGroupCollection) -> ProcessGroupCollection:
        """The groups of a token dispatcher whose tokens may go to any replica of their expert.

        Rank (d, p) of the D * P ranks is number d * P + p. All ranks of these groups call this in
        the same order.

        Args:
            pg_collection: a layer's groups, of which `ep`, `tp_ep`, `expt_tp`, `expt_dp` are used.

        Returns:
            `ep` and `tp_ep` joined over `expt_dp`, and `expt_tp`.

        Raises:
            ValueError: expert data parallelism is 1, or the ranks are in another order.
        """
        ep_ranks = tuple(dist.get_process_group_ranks(pg_collection.ep))
        if ep_ranks not in self._joined:
            joined = ProcessGroupCollection()
            joined.expt_tp = pg_collection.expt_tp
            joined.ep = self._join(pg_collection.ep, pg_collection.expt_dp)
            joined.tp_ep = self._join(pg_collection.tp_ep, pg_collection.expt_dp)
            self._joined[ep_ranks] = joined
        return self._joined[ep_ranks]

    def _join(self, group: dist.ProcessGroup, replicas: dist.ProcessGroup) -> dist.ProcessGroup:
        """One group of this group's ranks and those of its counterparts, a replica at a time."""
        num_replicas = dist.get_world_size(replicas)
        if num_replicas == 1:
            raise ValueError(
                "--moe-llep-replicas expert-dp: expert data parallelism is 1 here, no expert has a "
                "second replica; use more ranks or a smaller --expert-model-parallel-size, or "
                "leave the flag out"
            )
        rows: list = [None] * num_replicas
        dist.all_gather_object(rows, dist.get_process_group_ranks(group), group=replicas)
        ranks = [rank for row in rows for rank in row]
        if ranks != sorted(ranks):  # a torch group has its ranks in ascending order
            raise ValueError(
                f"--moe-llep-replicas expert-dp: ranks of the expert-parallel groups {rows} are "
                "not in ascending order; put expert data parallelism outside expert parallelism, "
                "as Megatron does, or leave the flag out"
            )
        return self._make_group(ranks, group, "LLEP_REPLICAS")

    def _make_group(
        self, ranks: list[int], like: dist.ProcessGroup, purpose: str
    ) -> dist.ProcessGroup:
        """A group for one purpose, made once.

        It has the time-out of `like`, and Megatron's list of groups holds it, so that a later
        change of all time-outs reaches it.
        """
        key = (purpose, tuple(ranks))
        if key not in self._groups:
            self._groups[key] = parallel_state.create_group(
                ranks,
                timeout=_get_timeout(like),
                use_local_synchronization=True,
                group_desc=purpose,
            )
        return self._groups[key]


def _get_timeout(group: dist.ProcessGroup) -> timedelta:
    # Torch has no public way to read it.
    return group._get_backend(group._device_types[0]).options._timeout
