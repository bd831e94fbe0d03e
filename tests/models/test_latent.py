"""Experts in a latent size: tokens and lent weights have it, routers and shared experts do not.

Megatron projects with a linear layer of Transformer Engine; here this project's stands in for it.
"""

from dataclasses import replace

import pytest

from megatron_llep.device.latent_projection import prepare_latent_projections
from megatron_llep.integration.convert import convert_model
from megatron_llep.metrics import PREFIX
from support.hybrid import hybrid_run
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.metrics import Scalars, report
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, train

LATENT = {"moe_latent_size": 8}
EP2 = {"layout": Layout(ep=2), "routing": Routing("hot")}


@pytest.fixture(autouse=True, scope="module")
def projections():
    prepare_latent_projections()


def test_latent_experts():
    settings = {
        "alone": LATENT,
        "shared experts": LATENT | {"moe_shared_expert_intermediate_size": 32},
        "recomputed": LATENT | {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        "biases": LATENT | {"add_bias_linear": True},
    }
    cases = {name: Case(Run(**EP2, config=config)) for name, config in settings.items()}
    grouped = replace(EAGER, expert_gemm="grouped_mm")
    hybrid = hybrid_run("*E-E/*E", **EP2, config=LATENT)
    cases["grouped GEMMs"] = replace(cases["shared experts"], llep=grouped)
    cases["hybrid"] = Case(hybrid)
    cases["hybrid, grouped GEMMs"] = Case(hybrid, grouped)
    compare_all(cases)


@pytest.mark.slow
def test_latent_experts_under_tensor_parallelism():
    run = replace(hybrid_run("*E*E", config=LATENT), routing=Routing("hot"))
    layouts = [Layout(tp=2, ep=2), Layout(tp=2, ep=2, etp=2)]
    for layout in layouts:
        compare_all({str(layout): Case(replace(run, layout=layout))}, timeout=500)


def test_metrics_tell_the_latent_size_of_what_is_lent():
    def observe(chunks: Chunks) -> Scalars:
        groups = {"pg_collection": None, "total_loss_dict": {}}
        return report(force_initialize=True, num_layers=2, **groups)[1]

    def work(rank: int, size: int) -> Scalars:
        run = Run(**EP2, config=LATENT, steps=1)
        with use_layout(run.layout):
            convert = {"transform_model": lambda chunks: convert_model(chunks, EAGER)}
            return train(run, **convert, observe=observe).observed

    expert_mib = 3 * 8 * 64 * 4 / 2**20  # gate, up and down, fp32
    for scalars in run_ranks(work, 2):
        lent = scalars[f"{PREFIX}lent_experts"]
        assert lent > 0
        assert scalars[f"{PREFIX}lent_mib"] == pytest.approx(lent * expert_mib)
        # One rank borrows of both layers, and keeps them until backward.
        assert scalars[f"{PREFIX}foreign_mib"] == pytest.approx(lent * expert_mib)
