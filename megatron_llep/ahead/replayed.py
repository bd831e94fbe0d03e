"""Routes that a router is about to obey: Megatron's router replay.

Letters: T tokens of this rank, K experts of a token, E experts, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe import router as megatron_router
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

# Those that leave the choice of experts to `topk_routing_with_score_function`.
_BALANCING = {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}
_MAP_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """One router's routes for the forward that comes."""

    replay: RouterReplay
    target: torch.Tensor
    """int64 [T, K]."""
    version: int
    """Of the target, which anything that writes to it raises."""

    def is_obeyed(self, num_tokens: int) -> bool:
        """Whether the router replays this very target, as it was, for so many tokens."""
        return (
            self.replay.router_replay_action == RouterReplayAction.REPLAY_FORWARD
            and self.replay.target_topk_idx is self.target
            and self.target._version == self.version
            and len(self.target) == num_tokens
        )


def find_replayed(router: torch.nn.Module, num_tokens: int) -> Replayed | None:
    """What a router is about to replay; None where its map may be another.

    Args:
        router: of a layer that has not run yet.
        num_tokens: T.
    """
    replay: Any = getattr(router, "router_replay", None)
    if getattr(replay, "router_replay_action", None) != RouterReplayAction.REPLAY_FORWARD:
        return None
    target = replay.target_topk_idx
    fits = (
        isinstance(target, torch.Tensor)
        and target.dtype == torch.int64
        and target.ndim == 2
        and len(target) == num_tokens
        and not target.is_inference()  # has no version
    )
    if not (fits and _only_replays(router)):
        return None
    return Replayed(replay=replay, target=target, version=target._version)


@torch.no_grad()
def count_pairs(targets: Sequence[torch.Tensor], num_experts: int) -> torch.Tensor:
    """Pairs with each expert: what the maps of L routers hold that replay the targets [T, K].

    A token that names an expert twice is one pair. Nothing waits for the device.

    Returns:
        int64 [L, E].
    """
    (T, _), at_once = targets[0].shape, len(targets)
    if T:
        at_once = max(1, _MAP_BYTES // (T * num_experts))
    counts = []
    for first in range(0, len(targets), at_once):
        chosen = torch.stack(list(targets[first : first + at_once]))
        maps = chosen.new_zeros((len(chosen), T, num_experts), dtype=torch.bool)
        counts.append(maps.scatter_(2, chosen, True).sum(dim=1, dtype=torch.int64))
    return torch.cat(counts)


def _only_replays(router: torch.nn.Module) -> bool:
    """Whether a router's map follows from what it replays, whatever its input is.

    It must be Megatron's own, which frameworks patch in several places, and neither drop pairs nor
    leave replay to a fused kernel that does not know of it.
    """
    if type(router) is not TopKRouter or type(router.router_replay) is not RouterReplay:
        return False
    config: Any = router.config
    balancing = router.routing_type
    kinds = {balancing} if isinstance(balancing, str) else set(balancing)
    own: dict[str, object] = vars(router) | vars(router.router_replay)
    return (
        kinds <= _BALANCING
        and not config.moe_router_fusion
        and config.moe_expert_capacity_factor is None
        and not router._forward_hooks  # one before it changes the input at most
        and own.keys().isdisjoint(("forward", "routing", "get_replay_topk"))
        and all(map(_is_of_megatron, _list_steps()))
    )


def _list_steps() -> list[Callable[..., Any]]:
    """From a router's input to its map."""
    return [
        TopKRouter.forward,
        TopKRouter.routing,
        RouterReplay.get_replay_topk,
        megatron_router.topk_routing_with_score_function,
    ]


def _is_of_megatron(function: Any) -> bool:
    """Whether nobody has put a function of their own in its place."""
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("megatron.core.")
