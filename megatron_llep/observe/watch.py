"""Hooks on routers: each micro-batch of training is counted, nothing else is touched.

Letters: T tokens of this rank, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.cuda_graphs import is_graph_capturing, is_graph_warmup
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import Router

from megatron_llep.metrics.tracker import LLEPMetricsTracker
from megatron_llep.observe.counts import Sharers


@dataclass(kw_only=True, eq=False)
class RouterHook:
    """A router's forward hook."""

    sharers: Sharers
    mtp_number: int | None = None
    """From 1, over all depths of multi-token prediction of a hybrid model; Megatron numbers its
    layers from 1 in each, and does not call them so."""

    def __call__(self, router: Router, inputs: Any, output: Any) -> None:
        """Count where the tokens go; the output ends with the routing map, bool [T, E]."""
        # Megatron's own rule for router metrics: a recomputed layer then counts once.
        if not (router.training and torch.is_grad_enabled()):
            return
        if is_graph_capturing() or is_graph_warmup():
            return
        tracker = get_moe_metrics_tracker()
        if isinstance(tracker, LLEPMetricsTracker):
            counts = output[1].detach().sum(dim=0, dtype=torch.int32)
            tracker.counts.add(self.sharers, self._find_layer(router), counts)

    def _find_layer(self, router: Router) -> int:
        """From 0 over the whole model, those of multi-token prediction last."""
        if self.mtp_number is not None:
            return self.mtp_number - 1 + router.config.num_layers
        number = router.layer_number or 1  # of none that Megatron numbered
        return number - 1 + router.is_mtp_layer * router.config.num_layers


def find_hook(router: torch.nn.Module) -> RouterHook | None:
    """The hook of a router that is watched."""
    hooks = router._forward_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, RouterHook)), None)


def watch_router(router: torch.nn.Module, sharers: Sharers) -> None:
    """Count what a router chooses from now on; of one that is watched already nothing changes."""
    if find_hook(router) is None:
        router.register_forward_hook(RouterHook(sharers=sharers))
