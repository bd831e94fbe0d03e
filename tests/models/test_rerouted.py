"""Routing that comes out differently when a layer is recomputed."""

from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.router import TopKRouter

from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all
from support.training import Chunks, Run

RECOMPUTES = {
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
}


def reroute(only_rank: int | None = None):
    """Send tokens to experts two further on in a recomputed forward, on one rank or all."""

    def prepare(chunks: Chunks) -> None:
        if only_rank not in (None, parallel_state.get_expert_model_parallel_rank()):
            return
        for router in (each for each in chunks[0].modules() if isinstance(each, TopKRouter)):
            router.gating = _reroute_gating(router.gating)

    return prepare


def _reroute_gating(gating):
    def gate(hidden: torch.Tensor) -> torch.Tensor:
        logits = gating(hidden)
        is_recomputed = is_checkpointing() and torch.is_grad_enabled()
        return logits.roll(2, dims=-1) if is_recomputed else logits

    return gate


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
def test_recomputed_routing_may_differ(foreign_weights):
    llep = replace(EAGER, foreign_weights=foreign_weights)
    compare_all(
        {
            f"{name}, {'all ranks' if only is None else 'one rank'}": Case(
                Run(layout=Layout(ep=2), config=config, prepare=reroute(only), steps=3), llep
            )
            for name, config in RECOMPUTES.items()
            for only in (None, 1)
        }
    )


def test_recompute_around_a_fallback():
    """Lending in forward and not in the recomputed forward, or the other way round."""
    run = Run(layout=Layout(ep=2), config=RECOMPUTES["moe"], steps=6, prepare=reroute())
    compare_all(
        {
            f"{threshold}": Case(run, replace(EAGER, imbalance_threshold=threshold))
            for threshold in (1.05, 1.1, 1.15, 1.2)
        }
    )
