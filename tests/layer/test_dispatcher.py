"""The dispatcher by itself, driven as Megatron's own dispatcher tests drive theirs.

Experts are the identity, so what comes back must be what went out, whichever slot it took.
"""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Placed, Planned, take
from megatron_llep.travel.alltoall import AlltoallDispatcher
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.slots import slot_of_expert
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


def test_without_a_layer_it_keeps_megatrons_contract():
    """Rows by slot, their counts, and the way back, with every expert-tensor-parallel rank.

    A row says where it comes from, its probability which expert it is for.
    """
    layout, K, T = Layout(tp=4, ep=2, etp=4), 2, 8

    def work(rank, size):
        with use_layout(layout):
            config = make_config(Run(layout=layout))
            E = config.num_moe_experts
            M = E // layout.ep
            group = get_default_pg_collection()
            natives = [group.ep.rank() * M + native for native in range(M)]
            dispatcher = AlltoallDispatcher(M, natives, config, group, llep=EAGER)
            plans: list[Planned] = []
            dispatcher.on_plan.append(plans.append)
            generator = torch.Generator().manual_seed(rank)
            routing_map = torch.zeros(T, E, dtype=torch.bool)
            routing_map[:, 0] = True  # in every token, and one more
            routing_map.scatter_(1, torch.randint(1, E, (T, 1), generator=generator), value=True)
            first = 100 * (group.expt_tp.rank() * layout.ep + group.ep.rank())
            hidden = torch.arange(first, first + T).float().view(T, 1, 1).repeat(1, 1, 4)
            hidden.requires_grad_()
            probs = torch.arange(1.0, E + 1).repeat(T, 1)

            rows, probs = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
            rows, probs = dispatcher.token_dispatch(rows, probs)
            rows, per_slot, probs = dispatcher.dispatch_postprocess(rows, probs)
            plan = plans[-1].plan
            assert per_slot.shape == (M + plan.max_foreign,)
            assert int(per_slot.sum()) == len(rows) == len(probs)
            slots = slot_of_expert(plan)[group.ep.rank()]
            sizes = per_slot.tolist()
            of_slots = zip(rows.split(sizes), probs.split(sizes), strict=True)
            for slot, (sources, experts) in enumerate(of_slots):
                assert (slots[experts.long().numpy() - 1] == slot).all()
                assert (sources[:, 0].diff() > 0).all(), "not by source, then token"

            output = dispatcher.combine_preprocess(rows / layout.expert_tp)
            output = dispatcher.combine_postprocess(dispatcher.token_combine(output))
            assert torch.equal(output, K * hidden)
            output.backward(hidden.detach())
            assert torch.equal(hidden.grad, K * hidden)
            return int(per_slot[M:].sum())

    assert max(run_ranks(work, layout.world_size)) > 0
