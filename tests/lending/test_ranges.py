"""A profile names LLEP's steps, in the order that hides lending behind the exchange of tokens."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from layer.test_layer_float64 import H, T, build_layer
from megatron_llep.integration.convert import convert_model
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.spread import use_spread_experts

TOKENS_BACK = "a token exchange, backward"
NODES = ("_AllToAllBackward", "_ExchangeRowsBackward")
"""Autograd nodes of a token exchange: Megatron's, and the one behind which lending starts."""
NATIVES, NATIVES_BACK, SHARED = "natives", "natives, backward", "shared experts"


def name_steps(rank, size, llep):
    """The steps of a layer that lends in every way at once."""
    with use_layout(Layout(ep=4)), pytest.MonkeyPatch.context() as monkeypatch:
        use_spread_experts(monkeypatch)
        layer = build_layer(Layout(ep=4), rank, 0.0, moe_shared_expert_intermediate_size=16)
        convert_model([layer], llep)
        generator = torch.Generator().manual_seed(rank)
        hidden = torch.rand(T, 1, H, generator=generator, dtype=torch.float64, requires_grad=True)
        return list_steps(layer, hidden)


def list_steps(layer, hidden):
    """LLEP's ranges, and the backward of token exchanges, in the order in which they begin."""
    layer.experts.register_forward_hook(mark_natives)
    layer.shared_experts.register_forward_hook(mark_shared)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        output, _ = layer(hidden)
        output.sum().backward()
    names = (*NODES, NATIVES, NATIVES_BACK, SHARED)
    found = [
        event
        for event in profiled.events()
        if event.name.startswith("llep/") or event.name in names
    ]
    found.sort(key=lambda event: event.time_range.start)
    found_names = [event.name.removeprefix("llep/") for event in found]
    return [TOKENS_BACK if name in NODES else name for name in found_names]


def mark_shared(*_):
    """Name the end of the shared experts' forward."""
    with record_function(SHARED):
        pass


def mark_natives(module, inputs, outputs):
    """Name the end of the natives' forward, and the start of their backward."""
    with record_function(NATIVES):
        pass

    def mark(_):
        with record_function(NATIVES_BACK):
            pass

    outputs[0].register_hook(mark)


FORWARD = ["count.start", SHARED, "count.wait", "plan", "place", "dispatch"]
FORWARD += ["lend.start", "lend.next", "experts", NATIVES, "lend.wait", "combine"]


def order_backward(llep):
    """What follows `FORWARD`."""
    # A token exchange has two of these nodes: of the tokens and of their probabilities.
    combine, dispatch = [TOKENS_BACK], [TOKENS_BACK] * 2
    fetch_again = llep.foreign_weights == "refetch"
    return [
        *(["lend.start"] if fetch_again else []),
        *combine,
        *(["lend.wait"] if fetch_again else []),
        "return.start",
        NATIVES_BACK,
        *dispatch,
        *(["return.next"] if llep.scatter_from else []),
        "return.wait",
    ]


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
@pytest.mark.parametrize("scatter_from", [0, 2])
def test_order(foreign_weights, scatter_from):
    llep = replace(EAGER, foreign_weights=foreign_weights, scatter_from=scatter_from)
    for steps in run_ranks(name_steps, 4, llep):
        assert steps[: len(FORWARD)] == FORWARD
        assert steps[len(FORWARD) :] == order_backward(llep)


def test_no_range_without_a_profiler(monkeypatch):
    monkeypatch.setattr(torch.profiler, "record_function", None)

    def work(rank, size):
        with use_layout(Layout(ep=2)):
            layer = build_layer(Layout(ep=2), rank, 1.0)
            convert_model([layer], EAGER)
            layer(torch.rand(T, 1, H, dtype=torch.float64))[0].sum().backward()

    run_ranks(work, 2)
