"""Context parallelism: ranks that share sequences lend to each other, and to those that do not.

Megatron's attention needs Transformer Engine there; this one is of the tests.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_llep.config import LLEPConfig
from support.comparison import get_relative_difference
from support.context import forward_part, with_gathering_attention
from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, make_tokens, train

GROUPED = replace(EAGER, expert_gemm="grouped_mm", foreign_weights="refetch")
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 5000}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
LOSSES = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}


def make_run(layout: Layout, *, routing: str = "natural", **settings: Any) -> Run:
    # A part of a sequence has a part of its loss.
    config = {"calculate_per_token_loss": True} | settings.pop("config", {})
    return Run(
        layout=layout,
        routing=Routing(routing),
        spec=with_gathering_attention,
        forward_step=forward_part,
        config=config,
        **settings,
    )


def case(layout: Layout, llep: LLEPConfig = EAGER, **settings: Any) -> Case:
    return Case(make_run(layout, **settings), llep)


def make_ragged_tokens(run: Run, step: int, micro_batch: int) -> torch.Tensor:
    """Token ids [b, s + 1], with another s for every micro-batch."""
    length = (16, 4, 12, 8)[micro_batch % 4]
    return make_tokens(replace(run, sequence_length=length), step, micro_batch)


def test_it_is_the_same_training_as_without():
    """Of plain Megatron: what the others are compared with."""

    def work(rank, size):
        whole, parts = (train(make_run(layout)) for layout in (Layout(ep=2), Layout(cp=2, ep=2)))
        assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
        for name, gradient in whole.gradients.items():
            assert get_relative_difference(parts.gradients[name], gradient) < 1e-4, name

    run_ranks(work, 2)


def test_two_parts():
    layout = Layout(cp=2, ep=2)
    compare_all(
        {
            "natural": case(layout, config=LOSSES),
            "hot, recomputed": case(layout, GROUPED, routing="hot", config=RECOMPUTED),
        }
    )


def test_two_parts_and_two_sequences():
    both = Layout(cp=2, ep=4)
    compare_all(
        {
            "token counts that differ": case(both, tokens=make_ragged_tokens),
            "replicas": case(Layout(cp=2, ep=2, dp=2), ddp=OVERLAP, steps=3),
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(cp=4, ep=4),
        Layout(cp=2, pp=2, ep=2),
        Layout(cp=2, tp=2, ep=2, etp=2),
        Layout(cp=2, tp=2, ep=4, etp=1),
    ],
    ids=str,
)
def test_layouts(layout):
    compare_all(
        {
            routing: case(layout, routing=routing, micro_batches=4, steps=4)
            for routing in ("natural", "hot")
        },
        timeout=240,
    )
