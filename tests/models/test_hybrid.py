"""Hybrid models of Megatron, whose layers follow a pattern: with LLEP they train as without.

Mamba layers and gated delta nets need kernels that are for GPUs only; the patterns here have none.
"""

import tempfile
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_layer_counts

from megatron_llep.integration.convert import convert_model, llep_hook, with_llep
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.metrics import METRICS, PREFIX
from support.comparison import get_relative_difference
from support.hybrid import hybrid_run, name_in_gpt
from support.layout import Layout, use_layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.metrics import Scalars, report
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, TrainResult, make_config, train
from support.versions import needs_megatron

EP2 = Layout(ep=2)
PP2 = Layout(pp=2, ep=2)
HOT = Routing("hot")
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def case(pattern: str, layout: Layout = EP2, *, everywhere: bool = True, **run: Any) -> Case:
    run = {"routing": HOT, **run}
    return Case(hybrid_run(pattern, layout=layout, **run), everywhere=everywhere)


ONE_STAGE = {
    "attention and experts": case("*E*E"),
    "dense layers, and experts first": case("E-*-EE*", tied_embeddings=True),
    "depths of multi-token prediction": case("*E*E/*E/*E"),
    "a depth of experts alone": case("*-/E", config={"moe_shared_expert_intermediate_size": 32}),
    "recomputed": case("*E-E", config=FULL),
}
TWO_STAGES = {
    "unlike stages": case("*-*E|*E*E", PP2),
    "one stage without experts, and multi-token prediction": case(
        "**-|EE/*E/*E", PP2, everywhere=False
    ),
    "no experts but in multi-token prediction": case("*|-/*E", PP2, everywhere=False),
    "a stage without layers": case("*E-E|", PP2, everywhere=False),
}


def test_one_stage():
    compare_all(ONE_STAGE)


def test_two_stages():
    compare_all(TWO_STAGES)


def test_virtual_stages():
    layout = Layout(pp=2, vpp=2, ep=2)
    compare_all({"and multi-token prediction": case("*E|-|E*|*E/*E", layout)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ("*E-E/*E", Layout(tp=2, ep=2)),
        ("*E*E", Layout(tp=2, ep=2, etp=2)),
        ("*E*E", Layout(ep=2, dp=4)),
        ("*-|*E|E|*E|E-|*E|*E|E", Layout(pp=4, vpp=2, ep=2)),
        ("*E|E|-*|E*E/E/E", Layout(pp=2, vpp=2, tp=2, ep=2)),
        ("*E*E*E", Layout(pp=3, ep=2)),
    ],
    ids=str,
)
def test_long_layouts(pattern, layout):
    compare_all({pattern: case(pattern, layout, micro_batches=8)}, timeout=500)


def test_is_the_gpt_model_of_the_same_weights():
    """With LLEP and without, and by multi-token prediction too."""

    def work(rank: int, size: int) -> int:
        config = {"num_layers": 2, "mtp_num_layers": 1}
        with use_layout(EP2):
            gpt = train(Run(layout=EP2, config=config))
            run = hybrid_run("*E*E/*E", as_gpt=True, layout=EP2)
            compare_with_gpt(train(run), gpt)
            lending = train_with_llep(run)
            compare_with_gpt(lending, gpt)
        return lending.observed.transfers

    assert min(run_ranks(work, 2, timeout=120)) > 0


def compare_with_gpt(hybrid: TrainResult, gpt: TrainResult) -> None:
    for mine, expected in zip(hybrid.losses, gpt.losses, strict=True):
        assert abs(mine - expected) <= 1e-5 * expected
    mine_of = {name_in_gpt(name): each for name, each in hybrid.gradients.items()}
    assert mine_of.keys() == gpt.gradients.keys()
    for name, expected in gpt.gradients.items():
        assert get_relative_difference(mine_of[name], expected) <= 1e-4, name


def report_layers(pattern: str, chunks: Chunks) -> tuple[str, Scalars, list[int], list[str]]:
    """What Megatron's training log makes of it, the routers' numbers, and names in a trace."""
    line, scalars = report(
        force_initialize=True,
        num_layers=get_hybrid_layer_counts(pattern)["E"],  # it tells that of the MoE layers
        moe_layer_freq=1,
        mtp_num_layers=None,
        pg_collection=None,
        total_loss_dict={},
    )
    traced: list[str] = []
    routers = [m.router.layer_number for c in chunks for m in c.modules() if hasattr(m, "router")]
    with tempfile.TemporaryDirectory() as folder:
        from megatron_llep.training.routing_trace import WholeModelTracer

        tracer = WholeModelTracer(folder, max_steps=1, rank=0)
        tracer.make_hook = traced.append
        tracer.register_hooks(chunks)
    return line, scalars, routers, traced


@needs_megatron((0, 19), "a trace of the routing")
def test_layers_are_numbered_over_the_whole_model():
    """In metrics those of multi-token prediction come last; Megatron numbers them from 1 again."""
    pattern = "*E|*E/*E/*E"
    decoder = "decoder.layers.{}.mlp.router"
    mtp = "mtp.layers.{}.mtp_model_layer.layers.1.mlp.router"

    def work(rank: int, size: int) -> str:
        run = hybrid_run(pattern, layout=PP2, routing=HOT, steps=1)
        observe = partial(report_layers, pattern)
        with use_layout(PP2):
            plain = train(run, observe=observe)
            hook = llep_hook(EAGER)
            by_hook = train(run, transform_model=lambda chunks: hook(chunks), observe=observe)
            by_spec = train(
                run, transform_spec=lambda spec: with_llep(spec, EAGER), observe=observe
            )
        for lending in (by_hook, by_spec):
            assert_same_run(lending, plain)
            line, scalars, routers, traced = lending.observed
            last = [decoder.format(3), mtp.format(0), mtp.format(1)]
            assert traced == (last if rank >= 2 else [decoder.format(1)])
            assert scalars[f"{PREFIX}lent_experts"] > 0
            assert routers == plain.observed[2]
            for metric in METRICS:
                assert f" {metric.name}: " in line
                layers = {f"{PREFIX}{metric.name}_layer_{layer}" for layer in (1, 3, 5, 7)}
                assert layers == {n for n in scalars if n.startswith(f"{PREFIX}{metric.name}_l")}
        return by_hook.observed[0]

    assert len(set(run_ranks(work, 4, timeout=120))) == 1


def test_errors_name_the_layer_of_multi_token_prediction():
    def work(rank: int, size: int) -> None:
        run = hybrid_run("*E/*E/*E", layout=EP2)
        with use_layout(EP2):
            (chunk,) = run.build(make_config(run), run, None)
            convert_model([chunk], EAGER)
            *_, last = (m for m in chunk.modules() if isinstance(m, LLEPMoELayer))
            last.experts.forward = None  # type: ignore[assignment]
            tokens = torch.zeros(1, run.sequence_length, dtype=torch.long)
            with pytest.raises(TypeError) as error:
                chunk(tokens, tokens, None, labels=tokens)
        assert "MTP layer 4" in "".join(error.value.__notes__)

    run_ranks(work, 2)
