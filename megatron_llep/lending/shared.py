"""What all layers of a model share: groups, a stream and a slab of memory for lending, progress."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llep.lending.grad_scratch import GradScratch
from megatron_llep.lending.groups import LENDING, REPLICAS, Key, make_groups
from megatron_llep.lending.hosts import Hosts
from megatron_llep.lending.memory import ForeignMemory
from megatron_llep.lending.progress import Progress
from megatron_llep.lending.replicas import GroupRanks, join_all, read_ranks
from megatron_llep.lending.side_stream import SideStream

if TYPE_CHECKING:
    from megatron_llep.observe.recorder import Recorder


@dataclass(frozen=True, kw_only=True)
class LayerGroups:
    """The groups of one MoE layer."""

    tokens: ProcessGroupCollection
    """Of the token dispatcher, which uses `ep`, `tp_ep` and `expt_tp`."""
    lending: dist.ProcessGroup
    """Its own with the ranks of `tokens.ep`, so that weights travel while tokens do."""
    ranks_per_node: int | None
    """Of these ranks, as their hostnames tell; None where they do not."""


class SharedLending:
    """Made once a model; every layer gets the same one."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.memory = ForeignMemory()
        self.grad_scratch = GradScratch()
        self.lends = True
        """Whether this rank agrees to lend; all ranks learn it with the counts."""
        self.progress = progress or Progress()
        self.recorder: Recorder | None = None
        """Of what the layers route, where it is recorded."""
        self._streams: dict[torch.device, SideStream] = {}
        self._joins_replicas = False
        self._ranks: dict[GroupRanks, GroupRanks] = {}
        self._groups: dict[Key, dist.ProcessGroup] = {}
        self._hosts: Hosts | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedLending":
        """Itself: layers built from a copied specification share what they would have shared.

        A process group has no copy either.
        """
        return self

    def stream_on(self, device: torch.device) -> SideStream:
        """The stream on which the experts of a device travel."""
        if device not in self._streams:
            self._streams[device] = SideStream(device)
        return self._streams[device]

    def prepare_groups(
        self, collections: Sequence[ProcessGroupCollection], *, join_replicas: bool
    ) -> None:
        """Make the groups that layers will ask for; all ranks of the job call it.

        Args:
            collections: groups of this rank's MoE layers, of which `ep`, `tp_ep`, `expt_dp` are
                used; nothing where it has no such layer.
            join_replicas: whether tokens may go to any replica of their expert.

        Raises:
            ValueError: on all ranks; the groups of some rank do not fit.
        """
        self._joins_replicas = join_replicas
        like = {read_ranks(each): each for each in collections}
        mine = list(like)
        self._ranks = dict(zip(mine, join_all(mine) if join_replicas else mine, strict=True))
        wanted: dict[Key, dist.ProcessGroup] = {}
        for own, shared in self._ranks.items():
            wanted[LENDING, shared.ep] = like[own].ep
            if join_replicas:
                wanted[REPLICAS, shared.ep] = like[own].ep
                wanted[REPLICAS, shared.tp_ep] = like[own].tp_ep
        self._groups = make_groups(wanted)
        self._hosts = Hosts.gather()

    def groups_of(self, pg_collection: ProcessGroupCollection) -> LayerGroups:
        """Of a layer, by its own groups.

        Raises:
            ValueError: they are others than `prepare_groups` was called with.
        """
        own = read_ranks(pg_collection)
        shared = self._ranks.get(own)
        if shared is None:
            raise ValueError(
                f"--moe-llep: an MoE layer is built with the expert-parallel ranks {list(own.ep)}, "
                f"for which no group was made; made were {[list(each.ep) for each in self._ranks]}."
                " Give with_llep the groups that the model is built with: pg_collection=..."
            )
        tokens = pg_collection
        if self._joins_replicas:
            tokens = ProcessGroupCollection(
                ep=self._groups[REPLICAS, shared.ep],
                tp_ep=self._groups[REPLICAS, shared.tp_ep],
                expt_tp=pg_collection.expt_tp,
            )
        assert self._hosts is not None, "they were gathered where the groups were made"
        return LayerGroups(
            tokens=tokens,
            lending=self._groups[LENDING, shared.ep],
            ranks_per_node=self._hosts.find_ranks_per_node(shared.ep),
        )

    def list_mixed_nodes(self) -> list[str]:
        """A line where nodes cannot be told by hostnames, of groups of this rank."""
        assert self._hosts is not None, "prepare_groups comes first"
        return self._hosts.list_mixed(each.ep for each in self._ranks.values())
