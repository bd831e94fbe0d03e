"""How even the ranks' loads are in forwards that training's metrics do not see.

Letters: F forwards, L MoE layers, E experts, R sources (ranks that share tokens, and their
expert-tensor-parallel ranks), P ranks.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_llep.dispatcher import LLEPTokenDispatcher
from megatron_llep.placement.forward import Planned
from megatron_llep.planner import imbalance_of, load_per_rank


@dataclass(frozen=True, kw_only=True)
class Imbalance:
    """The most loaded rank's (token, expert) pairs over the mean, of each forward and layer."""

    before: np.ndarray
    """[F, L], as plain expert parallelism would run."""
    after: np.ndarray
    """[F, L], as it ran."""

    def of(self, forwards: slice) -> "Imbalance":
        """Of some of the forwards."""
        return Imbalance(before=self.before[forwards], after=self.after[forwards])

    @property
    def worst_layer(self) -> tuple[float, float]:
        """Before and after, averaged over forwards; of the layer where this is largest.

        1 where nothing ran.
        """
        if self.before.size == 0:
            return 1.0, 1.0
        return float(self.before.mean(axis=0).max()), float(self.after.mean(axis=0).max())


class LoadWatch:
    """Counts what each forward routes and what each rank receives, without a host wait."""

    def __init__(self, layers: list[MoELayer]):
        self._layers = layers
        self._routed: list[list[torch.Tensor]] = [[] for _ in layers]  # [E] a forward
        self._received: list[list[int | None]] = [[] for _ in layers]

    def gather(self) -> Imbalance:
        """Put the ranks' numbers together; all ranks call it, after as many forwards each."""
        num_forwards = len(self._routed[0]) if self._layers else 0
        shape = (num_forwards, len(self._layers))
        before, after = np.ones(shape), np.ones(shape)
        if before.size == 0:
            return Imbalance(before=before, after=after)
        for (forward, number), rows in self._gather_rows():
            loads = self._get_loads_before(rows[:, :-1])
            before[forward, number] = after[forward, number] = imbalance_of(loads.tolist())
            received = rows[:, -1]
            if (received >= 0).all():
                ran = received.reshape(len(loads), -1).sum(axis=1)
                after[forward, number] = imbalance_of(ran.tolist())
        return Imbalance(before=before, after=after)

    def note_routed(self, number: int, router: Any, inputs: Any, output: Any) -> None:
        """A router's forward hook: its output ends with the routing map, bool [T, E]."""
        self._routed[number].append(output[1].sum(dim=0, dtype=torch.int64))

    def note_received(self, number: int, layer: Any, inputs: Any, output: Any) -> None:
        """A plain layer's forward hook: the tokens that came from all ranks are known by now."""
        splits = getattr(layer.token_dispatcher, "output_splits", None)
        self._received[number].append(None if splits is None else int(sum(splits)))

    def note_plan(self, number: int, rank: int, planned: Planned) -> None:
        """What an LLEP layer has routed, and planned to send to this rank of those that share.

        A hook on its router would keep it from being planned before it runs.
        """
        self._routed[number].append(planned.routing_map.sum(dim=0, dtype=torch.int64))
        self._received[number].append(int(planned.plan.load_per_rank_after[rank]))

    def _gather_rows(self) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """Forward and layer, and of each source [R, E + 1]: counts, then rows received.

        These are -1 where they are not known.
        """
        routed = torch.stack([torch.stack(layer) for layer in self._routed])
        received = [[-1 if rows is None else rows for rows in layer] for layer in self._received]
        mine = torch.cat((routed, routed.new_tensor(received).unsqueeze(2)), dim=2)
        group = self._layers[0].token_dispatcher.tp_ep_group
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        table = torch.stack(everyone, dim=2).cpu().numpy()  # [L, F, R, E + 1]
        for number, forward in np.ndindex(table.shape[:2]):
            yield (forward, number), table[number, forward]

    def _get_loads_before(self, counts: np.ndarray) -> np.ndarray:
        """[P] from counts [R, E]; the P ranks may be several groups that LLEP has joined."""
        layer = self._layers[0]
        num_ranks = dist.get_world_size(layer.token_dispatcher.ep_group)
        num_replicas = num_ranks * layer.num_local_experts // counts.shape[1]
        return load_per_rank(counts, num_replicas, num_ranks)


@contextlib.contextmanager
def watch_loads(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[LoadWatch]:
    """Watch the MoE layers of a model, with LLEP or without, in forwards under `no_grad`.

    (In training LLEP's own metrics are logged.) Within it nothing is exchanged:
    `LoadWatch.gather` is one collective, the same with LLEP and without.

    Args:
        model: or its chunks, wrapped or not.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    layers = [layer for chunk in chunks for layer in chunk.modules() if isinstance(layer, MoELayer)]
    watch = LoadWatch(layers)
    with contextlib.ExitStack() as watching:
        for number, layer in enumerate(layers):
            router: Any = layer.router
            dispatcher = layer.token_dispatcher
            if isinstance(dispatcher, LLEPTokenDispatcher):
                listener = partial(watch.note_plan, number, dispatcher.ep_rank)
                dispatcher.on_plan.append(listener)
                watching.callback(dispatcher.on_plan.remove, listener)
            else:
                handle = router.register_forward_hook(partial(watch.note_routed, number))
                watching.callback(handle.remove)
                handle = layer.register_forward_hook(partial(watch.note_received, number))
                watching.callback(handle.remove)
        yield watch
