"""Plain Megatron on the CPU: every layout computes what a single process computes."""

from dataclasses import replace

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


ADAM = {"optimizer": "adam", "lr": 1e-3}
"""Megatron's distributed optimizer does not take SGD."""

SETTINGS = {
    "interleaved stages": Run(layout=Layout(pp=2, vpp=2, ep=2), config={"num_layers": 4}),
    "tied embeddings": Run(layout=Layout(pp=2, ep=2), tied_embeddings=True),
    "overlapped reduction": Run(layout=Layout(ep=2, dp=4), ddp={"overlap_grad_reduce": True}),
    "distributed optimizer": Run(
        layout=Layout(ep=2, dp=4),
        ddp={
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        optimizer=ADAM,
    ),
    "expert recompute": Run(
        layout=Layout(ep=2),
        config={"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ),
    "full recompute": Run(
        layout=Layout(ep=2),
        config={
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "loss per token": Run(layout=Layout(ep=4), config={"calculate_per_token_loss": True}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_agrees_with_a_single_process(name):
    run = SETTINGS[name]
    alone = replace(run, layout=Layout(), ddp={})
    single = run_ranks(lambda rank, size: train(alone), 1)[0]
    assert_same_training(run_ranks(lambda rank, size: train(run), run.layout.world_size), single)


def test_experts_with_a_bias_agree_between_layouts():
    """A single process cannot train them: Megatron's own expert code fails at EP = TP = 1."""
    config = {"add_bias_linear": True}

    def train_in(layout):
        run = Run(layout=layout, config=config)
        return run_ranks(lambda rank, size: train(run), layout.world_size)

    two, four = train_in(Layout(ep=2)), train_in(Layout(ep=4))
    whole = replace(
        two[0],
        gradients=two[0].gradients | two[1].gradients,
        parameters=two[0].parameters | two[1].parameters,
    )
    assert any(name.endswith("experts.7.linear_fc2.bias") for name in whole.gradients)
    assert_same_training(four, whole)
