"""The same seed and layout give the same bits, however the ranks' clocks run."""

from dataclasses import replace

import pytest
import torch

from support.chaos import SkewedRouting, make_delays, watch_collectives
from support.layout import Layout
from support.llep import EAGER, train_with_llep
from support.ranks import run_ranks
from support.training import Run


def assert_same_bits(actual, expected):
    assert actual.losses == expected.losses
    assert actual.gradient_norms == expected.gradient_norms
    for name in ("gradients", "parameters", "optimizer_state"):
        for key, value in getattr(expected, name).items():
            assert torch.equal(getattr(actual, name)[key], value), f"{name}: {key} differs"


@pytest.mark.parametrize(
    "layout",
    [Layout(ep=2), Layout(ep=4), Layout(tp=2, ep=2, etp=2), Layout(pp=2, ep=2), Layout(ep=2, dp=4)],
    ids=str,
)
def test_a_second_run_has_the_same_bits(layout):
    run = Run(
        layout=layout,
        routing=SkewedRouting("skewed", layout.ep, skew=1.5),
        steps=3,
        micro_batches=2 * layout.data_parallel,
        ddp={"overlap_grad_reduce": True},
    )
    # Experts that are lent to several ranks: the sum of their gradients has an order.
    llep = replace(EAGER, planner="lla", scatter_from=2) if layout.ep == 4 else EAGER

    def train_twice(rank, size):
        first = train_with_llep(run, llep)
        with watch_collectives(make_delays(1, rank)):
            late = train_with_llep(run, llep)
        assert first.observed.transfers > 0
        assert late.observed == first.observed
        assert_same_bits(late, first)

    run_ranks(train_twice, layout.world_size)
