"""The forced routings are what their names say, under test as part of the harness."""

import pytest
import torch

from support.comparison import assert_same_training
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.routing import PATTERNS, Routing, force_routing
from support.training import Run, build_model, make_config, train

E, K, TOKENS = 8, 2, 80


def count_choices(pattern, layer=0, ranks=2):
    experts = Routing(pattern, ranks).choose(torch.arange(TOKENS), layer, E, K)
    assert all(len(set(row)) == K for row in experts.tolist())
    return torch.bincount(experts.flatten(), minlength=E)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_patterns(layer):
    assert count_choices("balanced", layer).tolist() == [TOKENS * K // E] * E

    hot = count_choices("hot", layer)
    assert hot.argmax() == 3 * layer % E
    assert hot.max() == 0.95 * TOKENS

    of_rank = count_choices("one_rank", layer).view(2, -1).sum(1)
    assert of_rank[layer % 2] == TOKENS * K

    of_rank = count_choices("starved", layer, ranks=4).view(4, -1).sum(1)
    assert (of_rank == 0).tolist() == [rank == layer % 4 for rank in range(4)]


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_the_models_routers_follow_and_learn(pattern):
    run = Run(routing=Routing(pattern))

    def route(rank, world_size):
        with use_layout(run.layout):
            chunks = build_model(make_config(run), run)
            force_routing(chunks, run.routing)
            router = chunks[0].decoder.layers[1].mlp.router
            torch.manual_seed(0)
            probs, routing_map = router(torch.randn(TOKENS, 1, 32))
            probs.square().sum().backward()
            return probs.detach(), routing_map.sum(0), router.weight.grad

    probs, counts, gradient = run_ranks(route, 1)[0]
    assert torch.equal(counts, count_choices(pattern, layer=1))
    assert probs.max(dim=1).values.median() < 0.99
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_routing_is_the_same_in_every_layout(pattern):
    run = Run(layout=Layout(tp=2, ep=2, etp=1), routing=Routing(pattern))
    single = run_ranks(lambda rank, size: train(Run(routing=run.routing)), 1)[0]
    assert_same_training(run_ranks(lambda rank, size: train(run), 2), single)
