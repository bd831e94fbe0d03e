"""What an LLEP layer records of a plan and of an exchange, if our tracker is in place."""

import numpy as np
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.metrics.tracker import LLEPMetricsTracker
from megatron_llep.planner import Plan, imbalance_of


def number_in_model(layer_number: int, is_mtp_layer: bool, config: TransformerConfig) -> int:
    """A layer's number over the whole model, from 0; multi-token prediction layers last.

    Args:
        layer_number: from 1, as Megatron counts; multi-token prediction layers from 1 again.
        is_mtp_layer: whether this is such a layer.
        config: of the model.
    """
    return layer_number - 1 + is_mtp_layer * config.num_layers


def record_plan(
    plan: Plan,
    load_before: np.ndarray,
    *,
    layer_number: int,
    is_mtp_layer: bool,
    config: TransformerConfig,
    expert_bytes: int,
    foreign_bytes: int,
    plan_seconds: float,
    expert_tokens: np.ndarray | None = None,
) -> None:
    """Record what one plan did, if our tracker is in place.

    Args:
        plan: the plan of this layer and micro-batch.
        load_before: tokens on each rank under plain expert parallelism. (The plan's own "before"
            is after tokens were spread over replicas.)
        layer_number: from 1, as Megatron counts; multi-token prediction layers from 1 again.
        is_mtp_layer: whether this is such a layer.
        config: of the model.
        expert_bytes: bytes of one expert's weights on one rank.
        foreign_bytes: most bytes of foreign weights alive on this rank since the last plan.
        plan_seconds: time the plan took.
        expert_tokens: [E] tokens of each expert, of one expert-parallel group, whoever computes
            them; None if not known.
    """
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, LLEPMetricsTracker):
        return
    lent, before, after = (
        len(plan.transfers),
        load_before.tolist(),
        plan.load_per_rank_after.tolist(),
    )
    values = {
        "overload_factor_before": imbalance_of(before),
        "overload_factor_after": plan.imbalance_after,
        "max_tokens_before": max(before),
        "max_tokens_after": max(after),
        "lent_experts": lent,
        "lent_mib": lent * expert_bytes / 2**20,
        "foreign_mib": foreign_bytes / 2**20,
        "fallback_rate": float(after == before),
        "plan_ms": plan_seconds * 1e3,
    }
    layer = number_in_model(layer_number, is_mtp_layer, config)
    tracker.record_layer(layer, values, experts=expert_tokens)


def record_exchange(
    sent: int,
    received: int,
    *,
    layer_number: int,
    is_mtp_layer: bool,
    config: TransformerConfig,
    group: dist.ProcessGroup,
) -> None:
    """Record one exchange of lent experts, or of their gradients, if our tracker is in place.

    Args:
        sent: bytes that this rank sends to others.
        received: bytes that it gets from others.
        layer_number: as for `record_plan`.
        is_mtp_layer: likewise.
        config: of the model.
        group: the ranks that take part.
    """
    tracker = get_moe_metrics_tracker()
    if isinstance(tracker, LLEPMetricsTracker):
        layer = number_in_model(layer_number, is_mtp_layer, config)
        tracker.record_exchange(layer, sent, received, group)
