"""LLEP trains as plain expert parallelism does: losses, norms, every gradient and parameter."""

from dataclasses import replace

import pytest
import torch

from support.layout import Layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, train

STEPS = 20


def compare(run: Run, llep=EAGER, seam="model", *, timeout: float = 120, bitwise: bool = False):
    """Train twice in one process group, plain and with LLEP; return what each rank's layers did."""

    def train_both(rank: int, size: int):
        plain = train(run)
        lending = train_with_llep(run, llep, seam)
        tolerances = {"loss_tolerance": 0, "gradient_tolerance": 0} if bitwise else {}
        assert_same_run(lending, plain, **tolerances)
        return lending.observed

    return run_ranks(train_both, run.layout.world_size, timeout=timeout)


def in_long(value):
    """A parameter whose cases others resemble."""
    return pytest.param(value, marks=pytest.mark.slow)


def make_run(layout: Layout, routing: Routing) -> Run:
    """Longer where the router chooses, whose weights what went wrong would change."""
    return Run(layout, routing=routing, steps=STEPS if routing.pattern == "natural" else STEPS // 2)


@pytest.mark.parametrize("pattern", ["natural", "balanced", "hot", "one_rank", "starved"])
@pytest.mark.parametrize("layout", [in_long(Layout(ep=2)), Layout(ep=4)], ids=str)
def test_every_routing(layout, pattern):
    loans = compare(make_run(layout, Routing(pattern, ranks=layout.ep)))
    for rank in loans:
        assert rank.plans > 0
        if pattern == "balanced":
            assert rank.transfers == 0
            continue
        assert rank.transfers > 0
        # Two micro-batch sizes of tokens, divided over the ranks: at most one token off the mean.
        assert rank.imbalance_after < 1.05 <= rank.imbalance_before


@pytest.mark.parametrize("pattern", [in_long("natural"), "hot"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, ep=2, etp=1),
        Layout(tp=2, ep=2, etp=2),
        Layout(pp=2, ep=2),
        Layout(ep=2, dp=4),
    ],
    ids=str,
)
def test_every_layout(layout, pattern):
    loans = compare(make_run(layout, Routing(pattern, ranks=2)))
    assert all(rank.transfers > 0 for rank in loans)


@pytest.mark.parametrize("seam", ["model", "spec"])
def test_both_seams(seam):
    loans = compare(Run(layout=Layout(ep=2), routing=Routing("hot")), seam=seam)
    assert all(rank.transfers > 0 for rank in loans)


def test_planner_lla_and_rank_order():
    llep = replace(EAGER, planner="lla", token_assignment="rank_order")
    loans = compare(Run(layout=Layout(ep=4), routing=Routing("one_rank", ranks=4)), llep)
    assert all(rank.transfers > 0 for rank in loans)


@pytest.mark.parametrize("shared", [None, 32], ids=["routed", "shared"])
def test_fallback_is_plain_megatron_bit_for_bit(shared):
    never = replace(EAGER, imbalance_threshold=100.0)
    run = Run(
        layout=Layout(ep=2),
        routing=Routing("hot"),
        config={"moe_shared_expert_intermediate_size": shared},
    )
    loans = compare(run, never, bitwise=True)
    assert all(rank.fallbacks == rank.plans > 0 for rank in loans)


MODELS = {
    "biases": {"add_bias_linear": True},
    "shared experts": {"moe_shared_expert_intermediate_size": 32},
    "overlapped shared experts": {
        "moe_shared_expert_intermediate_size": 32,
        "moe_shared_expert_overlap": True,
    },
    "one expert a rank": {
        "num_moe_experts": 2,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
    },
    "probabilities on input": {
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_apply_probs_on_input": True,
    },
    "dense first layer": {"moe_layer_freq": [0, 1]},
    "selective recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name):
    loans = compare(Run(layout=Layout(ep=2), routing=Routing("natural"), config=MODELS[name]))
    assert all(rank.transfers > 0 for rank in loans)


OPTIMIZERS = {
    "overlapped reduction": {"overlap_grad_reduce": True},
    "distributed optimizer": {"use_distributed_optimizer": True},
    "overlapped gather": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_data_parallel_mode(name):
    # Expert data parallelism of 2 and several steps: what is reduced too early, or lent before it
    # is gathered, shows from the second step on.
    run = Run(
        layout=Layout(ep=2, dp=4),
        routing=Routing("hot"),
        steps=4,
        micro_batches=8,
        ddp=OPTIMIZERS[name],
        # The distributed optimizer takes Adam alone; a large epsilon keeps the gradient's scale.
        optimizer={"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5},
    )
    loans = compare(run)
    assert all(rank.transfers > 0 for rank in loans)


def test_bf16_stays_close():
    # Only close: plain EP 2 and EP 4 already differ by some 1e-3 in bf16.
    run = Run(
        layout=Layout(ep=2),
        routing=Routing("hot"),
        config={"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16},
        optimizer={"bf16": True, "params_dtype": torch.bfloat16},
    )

    def train_both(rank: int, size: int):
        plain = train(run)
        for dtype in ("fp32", "param"):
            lending = train_with_llep(run, replace(EAGER, grad_dtype=dtype))
            assert lending.observed.transfers > 0
            assert_same_run(lending, plain, loss_tolerance=5e-3, gradient_tolerance=2e-2)

    run_ranks(train_both, 2)
