"""Layers whose attention, norm, router and shared experts are replayed from a graph.

The graph is a stand-in: as Megatron's capture it runs the layer up to the router, and as a replay
it hands out the same tensors every time. What follows a replay is Megatron's own code, and LLEP's.
"""

from typing import Any

import pytest
import torch
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout, use_layout
from support.llep import EAGER, train_with_llep
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run

GRAPHS = {"cuda_graph_impl": "transformer_engine"}
PUBLISHED = {"cuda_graph_modules": ["attn", "moe_router", "moe_preprocess"]}
SHARED = {"moe_shared_expert_intermediate_size": 32}


class StandInGraph:
    """Takes the place of one layer's graph."""

    def __init__(self, layer: TransformerLayer):
        self._layer = layer
        self._outputs: list[torch.Tensor] = []
        self.replays = 0

    def __call__(self, *args: Any, is_first_microbatch: bool = False, **kwargs: Any) -> Any:
        self.replays += 1
        cuda_graphs._set_capture_start()
        try:
            outputs = self._layer._te_cuda_graph_capture(*args, **kwargs)
        finally:
            cuda_graphs._set_capture_end()
        self._outputs = self._outputs or [torch.empty_like(each) for each in outputs]
        return tuple(map(_Replayed.apply, outputs, self._outputs))


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, static):
        static.copy_(output)
        return static.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def replay(chunks: Chunks) -> None:
    """Give the layers of a model with LLEP a graph each; the plain one runs without."""
    for layer in chunks[0].modules():
        if isinstance(layer, TransformerLayer) and isinstance(layer.mlp, LLEPMoELayer):
            layer.cuda_graphs.append(StandInGraph(layer))
            # Megatron's would ask for Transformer Engine.
            layer._get_te_cuda_graph_replay_args = lambda *args, **kwargs: (args, kwargs)


def graphed(config: dict, **settings: Any) -> Run:
    settings = {"layout": Layout(ep=2), "routing": Routing("hot")} | settings
    return Run(config=GRAPHS | PUBLISHED | config, prepare=replay, **settings)


def test_training_is_that_of_plain_megatron():
    overlap = {"overlap_grad_reduce": True, "bucket_size": 2000}
    compare_all(
        {
            "published": Case(graphed({}), EAGER),
            "router named alone": Case(graphed({"cuda_graph_modules": ["moe_router"]}), EAGER),
            "attention alone": Case(graphed({"cuda_graph_modules": ["attn"]}), EAGER),
            "shared experts": Case(graphed(SHARED, ddp=overlap, steps=3), EAGER),
            "shared experts, overlapped": Case(
                graphed(SHARED | {"moe_shared_expert_overlap": True}), EAGER
            ),
        },
        timeout=120,
    )


@pytest.mark.parametrize("seam", ["model", "spec"])
def test_counting_is_taken_out_of_the_graph(seam):
    def work(rank, size):
        with use_layout(Layout(ep=2)):
            replays = []

            def note(chunks: Chunks) -> None:
                replay(chunks)
                for layer in chunks[0].decoder.layers:
                    modules = [module.name for module in layer.config.cuda_graph_modules]
                    assert modules == ["attn", "moe_router"]
                    replays.append(layer.cuda_graphs[0])

            run = Run(
                layout=Layout(ep=2), steps=1, config=GRAPHS | PUBLISHED | SHARED, prepare=note
            )
            assert train_with_llep(run, seam=seam).observed.transfers > 0
            return [graph.replays for graph in replays]

    assert run_ranks(work, 2) == [[2, 2], [2, 2]]


def test_a_graph_that_would_hold_the_experts():
    """Whatever captures it: every rank says so, before anything is sent."""

    def work(rank, size):
        def capture(chunks: Chunks) -> None:
            cuda_graphs._set_capture_start()

        run = Run(layout=Layout(ep=2), steps=1, prepare=capture)
        try:
            with pytest.raises(ValueError, match="--cuda-graph-modules: a graph would hold the"):
                train_with_llep(run)
        finally:
            cuda_graphs._set_capture_end()

    run_ranks(work, 2)
