"""Ranks that planned differently are told so, instead of training on wrong weights."""

import numpy as np
import pytest
import torch

from megatron_llep import dispatcher
from megatron_llep.integration.convert import convert_model
from megatron_llep.planner import Plan, make_plan, plan_from_quota
from megatron_llep.planner.plan import native_quota
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, build_model, make_config


def lend_another(plan: Plan) -> Plan:
    """The plan in which the lender lends its next expert instead, with as many tokens."""
    expert = plan.transfers[0, 0]
    quota = plan.quota.copy()
    quota[[expert, expert + 1]] = quota[[expert + 1, expert]]
    return plan_from_quota(quota)


def lend_nothing(plan: Plan) -> Plan:
    return plan_from_quota(native_quota(plan.quota.sum(axis=1), plan.num_ranks))


@pytest.mark.parametrize(
    ("plan_otherwise", "at_once"),
    [(lend_another, False), (lend_another, True), (lend_nothing, True)],
    ids=["with the next counts", "at once", "exchanges of other sizes"],
)
def test_ranks_that_planned_differently_are_named(plan_otherwise, at_once):
    """Nothing else sees it where all sizes are the same; where they are not, ranks would wait."""

    def work(rank, size):
        run = Run(layout=Layout(ep=2), routing=Routing("natural"))
        with use_layout(run.layout), pytest.MonkeyPatch.context() as monkeypatch:
            (model,) = convert_model(build_model(make_config(run), run), EAGER)
            layers = [layer.mlp for layer in model.decoder.layers]
            count, E = layers[0].config.moe_router_topk, layers[0].config.num_moe_experts
            # Every token goes to the first experts of rank 0, which are alike in their counts.
            routing_map = torch.zeros(16, E, dtype=torch.bool)
            routing_map[:, :count] = True
            hidden = torch.randn(16, 1, layers[0].config.hidden_size)
            if rank == 1:
                plan_as_ever = dispatcher.plan_over_replicas

                def plan_alone(counts, **options):
                    plan, counts = plan_as_ever(counts, **options)
                    return plan_otherwise(plan), counts

                monkeypatch.setattr(dispatcher, "plan_over_replicas", plan_alone)
            for number, layer in enumerate(layers[:2]):
                layer.token_dispatcher.compares_at_once &= at_once
                assert number == 0 or not at_once, "seen in the first layer"
                probs = routing_map.float() / count
                rows, probs = layer.preprocess(hidden, probs, routing_map)
                layer.combine(layer.routed_experts_compute(*layer.dispatch(rows, probs))[0])

    with pytest.raises(Exception, match="planned differently") as caught:
        run_ranks(work, 2, timeout=60)
    assert "ranks [0]: plan" in str(caught.value)
    assert "ranks [1]: plan" in str(caught.value)


def test_equal_plans_have_equal_digests():
    counts = np.array([[30, 2, 1, 1], [20, 2, 3, 1]])
    plans = [make_plan(counts, planner=planner) for planner in ("exact", "exact", "tolerant")]
    assert plans[0].digest == plans[1].digest
    fewer = make_plan(counts - np.array([[1, 0, 0, 0], [0, 0, 0, 0]]), planner="exact")
    none = make_plan(counts, planner="exact", max_foreign=0)
    assert len({plans[0].digest, fewer.digest, none.digest}) == 3
    for plan in (*plans, fewer, none):
        np.array([plan.digest], dtype=np.int64)  # fits
