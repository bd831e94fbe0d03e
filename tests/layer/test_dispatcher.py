"""The dispatcher by itself, driven as Megatron's own dispatcher tests drive theirs.

Experts are the identity, so what comes back must be what went out, whichever slot it took.
"""

import pytest
import torch

from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Placed, Planned, take
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.training import Run, build_model, make_config

LAYOUTS = [Layout(ep=2), Layout(ep=4), Layout(tp=2, ep=2, etp=2), Layout(tp=2, ep=2, etp=1)]


@pytest.mark.parametrize("way", ["apart", "as Megatron's layer calls it"])
@pytest.mark.parametrize("pattern", ["natural", "hot", "one_rank"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_come_back(layout, pattern, way):
    def work(rank, size):
        run = Run(layout=layout, routing=Routing(pattern, ranks=layout.ep))
        with use_layout(layout):
            chunks = build_model(make_config(run), run)
            convert_model(chunks, EAGER)
            force_routing(chunks, run.routing)
            layer = chunks[0].decoder.layers[0].mlp
            dispatcher = layer.token_dispatcher
            planned: list[Planned] = []
            note_decisions(chunks, planned)
            generator = torch.Generator().manual_seed(rank)
            hidden = torch.randn(32, 4, layer.config.hidden_size, generator=generator)
            hidden.requires_grad_(True)

            probs, routing_map = layer.router(hidden)
            probs = torch.ones_like(probs) / layer.router.topk
            tokens, probs = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
            tokens, probs = dispatcher.token_dispatch(tokens, probs)
            plan = planned[-1].plan
            if way == "apart":
                placed = take(Placed, tokens)
                parts = (dispatcher.num_native, plan.max_foreign)
                rows = dispatcher.sort_by_slot(placed, tokens, probs, parts)
                sizes = [int(each.sum()) for each in placed.exchange.rows_per_slot.split(parts)]
            else:
                tokens, per_slot, probs = dispatcher.dispatch_postprocess(tokens, probs)
                rows, sizes = [(tokens, probs)], [int(per_slot.sum())]
                assert len(per_slot) == dispatcher.num_native + plan.max_foreign
            assert [len(tokens) for tokens, _ in rows] == sizes
            assert [len(probs) for _, probs in rows] == sizes
            # Every expert-tensor-parallel rank adds its share.
            outputs = [tokens * probs.unsqueeze(-1) / layout.expert_tp for tokens, probs in rows]
            if way == "apart":
                output = dispatcher.sort_by_source(placed, outputs)
            else:
                output = dispatcher.combine_preprocess(outputs[0])
            output = dispatcher.combine_postprocess(dispatcher.token_combine(output))
            assert get_relative_difference(output, hidden) < 1e-6

            # Each expert-tensor-parallel rank sends the whole gradient back.
            gradient = torch.randn(output.shape, generator=generator)
            output.backward(gradient)
            assert get_relative_difference(hidden.grad, gradient) < 1e-5
            return plan.max_foreign

    foreign = run_ranks(work, layout.world_size)
    assert all(foreign)
