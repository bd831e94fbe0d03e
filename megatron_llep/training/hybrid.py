"""Megatron's configuration of a hybrid model, from a training script's arguments."""

from argparse import Namespace
from collections.abc import Callable

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_llep.compat.training import HybridModelConfig, hybrid_config_from_args
from megatron_llep.integration.hybrid_spec import build_local_hybrid_spec

Chunks = list[torch.nn.Module]
# Kind of auxiliary loss -> its name in Megatron's tracker.
_ROUTER_METRICS = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def build_hybrid_config(args: Namespace) -> HybridModelConfig:
    """Megatron's configuration of a hybrid model; with `--transformer-impl local`, local layers.

    Raises:
        ValueError: as `build_local_hybrid_spec`.
    """
    config = hybrid_config_from_args(args)
    if config.hybrid_stack_spec is None and config.transformer.transformer_impl == "local":
        config.hybrid_stack_spec = build_local_hybrid_spec(config.transformer)
    config.pre_wrap_hooks.append(_size_router_metrics(args))
    return config


def _size_router_metrics(args: Namespace) -> Callable[[Chunks], Chunks]:
    """A hook that makes room for the router's metrics, as many layers on every rank.

    Where a stage has no MoE layer Megatron's log makes room for the MoE layers of a hybrid model
    alone, which is less than the other stages have, and ranks reduce unlike sizes.
    """
    kinds = args.moe_router_load_balancing_type
    names = [name for kind, name in _ROUTER_METRICS.items() if kind in kinds]
    if args.moe_z_loss_coeff is not None:
        names.append("z_loss")

    def make_room(chunks: Chunks) -> Chunks:
        for name in names if args.num_experts else ():
            num_layers = args.num_layers + (args.mtp_num_layers or 0)
            get_moe_metrics_tracker().ensure_initialized(name, num_layers)
        return chunks

    return make_room
