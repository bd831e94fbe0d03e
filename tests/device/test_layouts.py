"""Plain Megatron on the CPU: every layout computes what a single process computes."""

import pytest
from support.comparison import assert_same_training
from support.layout import Layout
from support.ranks import run_ranks
from support.training import Run, train

LAYOUTS = [
    Layout(ep=2),
    Layout(ep=4),
    Layout(tp=2, ep=2, etp=1),
    Layout(tp=2, ep=2, etp=2),
    Layout(pp=2, ep=2),
    Layout(ep=2, dp=4),
]


@pytest.fixture(scope="module")
def single():
    return run_ranks(lambda rank, size: train(Run()), 1)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_agrees_with_a_single_process(layout, single):
    results = run_ranks(lambda rank, size: train(Run(layout=layout)), layout.world_size)
    assert_same_training(results, single)
