"""Gradients of lent experts are home before their reduction starts, however late they come.

Every test here is run a second time with the ordering taken away, to show that it would be seen.
"""

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_llep import layer
from megatron_llep.experts.base import LendableExperts
from megatron_llep.integration.convert import convert_model
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.lending import nodes
from megatron_llep.lending.loan import WeightLoan
from support.layout import Layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, train

# A reduction that starts too early shows with overlap, expert data parallelism and SGD, and from
# the second step on: Megatron reduces the first batch's gradients without overlap.
OVERLAP = Run(
    layout=Layout(ep=2, dp=4),
    routing=Routing("hot"),
    steps=3,
    micro_batches=8,
    ddp={"overlap_grad_reduce": True},
)


def hold_nothing(loan, natives, hidden, *, hold_all):
    """`hold_grads` as it would be if the native weights were not its inputs."""
    if loan is None or not (loan.returns and torch.is_grad_enabled()):
        return hidden
    return nodes._HoldGrads.apply(loan, (), hidden, torch.empty(0, requires_grad=True))


def delay_return(monkeypatch, seconds):
    start_return = WeightLoan.start_return

    def start_late(loan):
        time.sleep(seconds)
        start_return(loan)

    monkeypatch.setattr(WeightLoan, "start_return", start_late)


def is_same_with_one_late_rank(run, late_rank, *, ordered):
    def work(rank, size):
        plain = train(run)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if rank == late_rank:
                delay_return(monkeypatch, 0.02)
            if not ordered:
                monkeypatch.setattr(layer, "hold_grads", hold_nothing)
            lending = train_with_llep(run)
        assert lending.observed.transfers > 0
        try:
            assert_same_run(lending, plain)
        except AssertionError:
            return False
        return True

    return run_ranks(work, run.layout.world_size, timeout=120)


@pytest.mark.parametrize("late_rank", [0, 3])
def test_one_late_rank_changes_nothing(late_rank):
    assert is_same_with_one_late_rank(OVERLAP, late_rank, ordered=True) == [True] * 4


def test_returns_after_the_reduction_are_seen():
    assert is_same_with_one_late_rank(OVERLAP, 0, ordered=False) == [False] * 4


def count_early_hooks(run, *, ordered):
    """Gradient hooks of native weights that fired, and those that fired before the return."""

    def work(rank, size):
        gated: Counter[int] = Counter()
        fired: Counter[tuple[int, str]] = Counter()
        early: list[tuple[int, str]] = []
        kept = []  # AccumulateGrad nodes live only as long as someone holds them

        def note_gate(backward):
            def watched(ctx, grad_hidden):
                result = backward(ctx, grad_hidden)
                gated[layer_of[id(ctx.loan.natives[0][0])]] += 1
                return result

            return staticmethod(watched)

        def watch_weight(layer, name, weight):
            def note(*_):
                fired[layer, name] += 1
                if gated[layer] < fired[layer, name]:
                    early.append((layer, name))

            node = weight.expand_as(weight).grad_fn.next_functions[0][0]
            node.register_hook(note)
            kept.append(node)

        layer_of = {}

        def watch(chunks):
            convert_model(chunks, EAGER)
            for module in chunks[0].modules():
                if isinstance(module, LLEPMoELayer):
                    layer_of[id(module.lendable.weights()[0][0])] = module.layer_number
                    for name, weight in module.experts.named_parameters():
                        watch_weight(module.layer_number, name, weight)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(nodes._HoldGrads, "backward", note_gate(nodes._HoldGrads.backward))
            if not ordered:
                monkeypatch.setattr(layer, "hold_grads", hold_nothing)
            train(run, transform_model=watch)
        return sum(fired.values()), len(early)

    return run_ranks(work, run.layout.world_size)


FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


OVERLAPPED_EXCHANGE = {
    "overlap_moe_expert_parallel_comm": True,
    # Megatron wants the flag; the numbers are fp32's.
    "bf16": True,
    "attention_softmax_in_fp32": False,
}


@pytest.mark.parametrize(
    "config",
    [{}, FULL_RECOMPUTE, OVERLAPPED_EXCHANGE],
    ids=["no recompute", "full recompute", "overlapped exchange"],
)
def test_the_return_is_added_before_any_gradient_hook(config):
    run = replace(OVERLAP, steps=2, config=config)
    # 2 steps x 2 micro-batches a rank x 2 layers x 4 native experts x 2 weights.
    assert count_early_hooks(run, ordered=True) == [(64, 0)] * 4
    assert all(early > 0 for _, early in count_early_hooks(run, ordered=False))


def test_only_lent_experts_wait_where_nothing_is_reduced():
    run = Run(layout=Layout(ep=2), routing=Routing("hot"))
    # The hot expert is rank 0's in layer 1 and 2, and the only one lent: 3 of 4 do not wait there,
    # and none of rank 1's.
    assert count_early_hooks(run, ordered=True) == [(64, 48), (64, 64)]


GATHER = Run(
    layout=Layout(ep=2, dp=4),
    routing=Routing("hot"),
    steps=3,
    micro_batches=8,
    ddp={
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    # The distributed optimizer takes Adam alone; a large epsilon keeps the gradient's scale.
    optimizer={"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5},
)


@pytest.mark.parametrize("waits", [True, False], ids=["waited for", "seen when not"])
def test_fresh_weights_are_lent_under_overlapped_gather(waits):
    def work(rank, size):
        plain = train(GATHER)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if not waits:
                monkeypatch.setattr(LendableExperts, "parameter_hooks", lambda self: [])
            lending = train_with_llep(GATHER)
        assert lending.observed.transfers > 0
        try:
            assert_same_run(lending, plain)
        except AssertionError:
            return False
        return True

    same = run_ranks(work, GATHER.layout.world_size, timeout=120)
    assert all(same) if waits else not any(same)


def test_late_returns_with_refetched_weights_and_a_pipeline():
    run = replace(OVERLAP, layout=Layout(pp=2, ep=2), micro_batches=8)
    assert is_same_with_one_late_rank(run, 1, ordered=True) == [True] * 4
