"""Transformer Engine's natives hide lending, too: the same steps in the same order.

TE's kernels are stand-ins here.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

from te_experts import TE_CONFIG, use_te_experts

from lending.test_ranges import FORWARD, list_steps, order_backward
from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.training import Run, build_model, make_config

pytestmark = pytest.mark.te


def name_steps(rank, size, llep):
    shared = {"moe_shared_expert_intermediate_size": 16}
    run = Run(layout=Layout(ep=2), config=TE_CONFIG | shared, spec=use_te_experts)
    with use_layout(run.layout):
        chunks = build_model(make_config(run), run)
        convert_model(chunks, llep)
        force_routing(chunks, Routing("hot"))
        layer = chunks[0].decoder.layers[0].mlp
        planned: list[Planned] = []
        note_decisions([layer], planned)
        generator = torch.Generator().manual_seed(rank)
        hidden = torch.rand(
            32, 2, layer.config.hidden_size, generator=generator, requires_grad=True
        )
        return list_steps(layer, hidden), planned[-1].plan.max_foreign


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
def test_natives_run_while_weights_and_gradients_travel(foreign_weights):
    llep = replace(EAGER, foreign_weights=foreign_weights, scatter_from=0)
    for steps, num_foreign in run_ranks(name_steps, 2, llep):
        assert num_foreign
        # There is no exchange of shards to start.
        assert steps[: len(FORWARD)] == FORWARD
        assert steps[len(FORWARD) :] == order_backward(llep)
