"""Forwards in which nothing is lent, and loads of forwards that training does not count."""

import numpy as np
import pytest
import torch

from megatron_llep import convert_model, no_lending, watch_loads
from megatron_llep.placement.forward import Planned
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.training import Run, build_model, make_config, make_tokens

RUN = Run(layout=Layout(ep=2), routing=Routing("hot"), config={"moe_router_dtype": "fp32"})


def build(run: Run, decisions: list[Planned] | None = None) -> torch.nn.Module:
    """With LLEP where its decisions are asked for."""
    (model,) = build_model(make_config(run), run)
    if decisions is not None:
        note_decisions(convert_model([model], EAGER), decisions)
    force_routing([model], run.routing)
    return model


def forward(model: torch.nn.Module, run: Run, rank: int) -> torch.Tensor:
    tokens = make_tokens(run, 0, rank)[:, :-1]
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


@pytest.mark.parametrize("withholding", [(0, 1), (1,)], ids=["all", "one"])
def test_nothing_is_lent_as_soon_as_one_rank_withholds(withholding):
    def work(rank, size):
        decisions: list[Planned] = []
        with use_layout(RUN.layout):
            expected = forward(build(RUN), RUN, rank)
            model = build(RUN, decisions)
            forward(model, RUN, rank).sum().backward()
            assert not any(decision.plan.is_fallback for decision in decisions)
            decisions.clear()
            if rank in withholding:
                with no_lending(model), no_lending([model]):
                    output = forward(model, RUN, rank)
            else:
                output = forward(model, RUN, rank)
            assert len(decisions) == 2  # layers
            for decision in decisions:
                assert decision.plan.is_fallback
                assert decision.trains
            assert get_relative_difference(output, expected) <= 1e-5
            decisions.clear()
            forward(model, RUN, rank)
            assert not any(decision.plan.is_fallback for decision in decisions)

    run_ranks(work, 2)


def test_ends_with_an_error_inside():
    def work(rank, size):
        decisions: list[Planned] = []
        with use_layout(RUN.layout):
            model = build(RUN, decisions)
            with pytest.raises(KeyError), no_lending(model):
                raise KeyError
            forward(model, RUN, rank)
            assert not decisions[0].plan.is_fallback

    run_ranks(work, 2)


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(tp=2, ep=2, etp=2)], ids=str)
def test_loads_are_those_of_the_plans_and_those_of_plain_megatron(layout):
    run = Run(layout=layout, routing=Routing("natural"))

    def watch(rank: int, decisions: list[Planned] | None = None):
        model = build(run, decisions)
        source = rank // layout.tp
        with torch.no_grad(), watch_loads(model) as loads:
            for _ in range(2):
                forward(model, run, source)
            with no_lending(model):
                forward(model, run, source)
        forward(model, run, source)  # is not counted
        return loads.gather()

    def work(rank, size):
        decisions: list[Planned] = []
        with use_layout(layout):
            plain, lending = watch(rank), watch(rank, decisions)
        assert lending.before.shape == lending.after.shape == (3, 2)
        assert np.array_equal(plain.before, lending.before)
        assert np.array_equal(plain.after, plain.before)
        before = [each.load_before.max() / each.load_before.mean() for each in decisions[:6]]
        after = [each.plan.imbalance_after for each in decisions[:6]]
        assert lending.before.flatten() == pytest.approx(before)
        assert lending.after.flatten() == pytest.approx(after)
        assert (lending.after[:2] < lending.before[:2]).all()
        assert np.array_equal(lending.after[2], lending.before[2])
        assert lending.of(slice(2, 3)).worst_layer == pytest.approx((max(before[4:]),) * 2)

    run_ranks(work, layout.world_size)


def test_nothing_watched_is_even():
    def work(rank, size):
        with use_layout(RUN.layout), watch_loads(build(RUN)) as loads:
            pass
        assert loads.gather().worst_layer == (1.0, 1.0)

    run_ranks(work, 2)
