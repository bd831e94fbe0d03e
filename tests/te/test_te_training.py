"""Training with Transformer Engine's experts is that of plain Megatron with the same experts.

TE's kernels are stand-ins here.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformer_engine.pytorch")

from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.extensions.transformer_engine import TEQuantizationParams, TEQuantizationRecipe
from te_cpu_stand_in import make_fp8_recipe
from te_experts import TE_CONFIG, use_te_experts

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout
from support.llep import EAGER, train_with_llep
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, train

pytestmark = pytest.mark.te

FUSED = {"gradient_accumulation_fusion": True}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000}
PROBS_ON_INPUT = {
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "moe_apply_probs_on_input": True,
}
KEEP, REFETCH = (replace(EAGER, foreign_weights=choice) for choice in ("keep", "refetch"))


EP2 = Layout(ep=2)


def te_run(layout: Layout = EP2, routing: str = "natural", **settings) -> Run:
    settings["config"] = TE_CONFIG | settings.get("config", {})
    return Run(layout=layout, routing=Routing(routing), spec=use_te_experts, **settings)


def bf16_case(config: dict, **settings) -> Case:
    # Forced routing: near ties of the router go either way in bf16.
    run = te_run(
        routing="hot",
        config=BF16 | config,
        optimizer={"bf16": True, "params_dtype": torch.bfloat16},
        **settings,
    )
    return Case(run, loss_tolerance=5e-3, gradient_tolerance=2e-2)


def lend_only(*micro_batches: int, of: int = 4):
    """Make layers fall back in all micro-batches of a step but these."""

    def prepare(chunks: Chunks) -> None:
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, LLEPMoELayer):
                    _choose(module.token_dispatcher)

    def _choose(dispatcher) -> None:
        plan, count = dispatcher.plan, itertools.count()

        def plan_as_told(*args, **kwargs):
            lends = next(count) % of in micro_batches
            threshold = 1.0 if lends else 100.0
            dispatcher.llep = replace(dispatcher.llep, imbalance_threshold=threshold)
            return plan(*args, **kwargs)

        dispatcher.plan = plan_as_told

    return prepare


def test_two_ranks():
    compare_all(
        {
            "fp32": Case(te_run()),
            "refetched": Case(te_run(), REFETCH),
            "fused": Case(te_run(config=FUSED, routing="hot"), KEEP),
            "fused, refetched": Case(te_run(config=FUSED), REFETCH),
            "fused, one rank": Case(te_run(config=FUSED, routing="one_rank")),
            "fused, starved": Case(te_run(config=FUSED, routing="starved")),
            "biases": Case(te_run(config={"add_bias_linear": True})),
            "biases, fused": Case(te_run(config=FUSED | {"add_bias_linear": True}), REFETCH),
            "overlapped": Case(te_run(config=FUSED, ddp=OVERLAP, steps=3)),
            "probabilities on input": Case(te_run(config=PROBS_ON_INPUT)),
            "not gated": Case(te_run(config={"gated_linear_unit": False})),
            "bf16": bf16_case({}),
            "bf16, fused": bf16_case(FUSED),
        },
        timeout=200,
    )


def test_frozen_on_some_ranks():
    """A rank whose own experts are frozen computes the gradients of those that it borrows."""

    def freeze(on_rank: int):
        def prepare(chunks: Chunks) -> None:
            for name, parameter in chunks[0].named_parameters():
                frozen = ".experts." in name and dist.get_rank() == on_rank
                parameter.requires_grad_(not frozen)

        return prepare

    compare_all(
        {
            "the lender's, fused": Case(te_run(config=FUSED, routing="hot", prepare=freeze(0))),
            "the borrower's, fused": Case(te_run(config=FUSED, routing="hot", prepare=freeze(1))),
            "the borrower's": Case(te_run(routing="hot", prepare=freeze(1)), REFETCH),
        },
        timeout=120,
    )


def recompute(*modules: str) -> dict:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


SHARED = {"moe_shared_expert_intermediate_size": 32}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def test_recompute():
    compare_all(
        {
            "moe_act": Case(te_run(config=recompute("moe_act"))),
            "moe_act, fused": Case(te_run(config=FUSED | recompute("moe_act")), REFETCH),
            "moe": Case(te_run(config=FUSED | recompute("moe"))),
            "full": Case(te_run(config=FUSED | FULL)),
            # Megatron's needs Transformer Engine, though the norm is torch's here.
            "layernorm": Case(te_run(config=FUSED | recompute("layernorm")), REFETCH),
            "layernorm, moe": Case(te_run(config=recompute("layernorm", "moe"))),
            "layernorm, shared experts": Case(
                te_run(config=SHARED | recompute("layernorm", "shared_experts", "moe_act"))
            ),
        },
        timeout=120,
    )


def test_lending_and_falling_back_in_one_step():
    settings = {"config": FUSED, "micro_batches": 8, "ddp": OVERLAP}
    compare_all(
        {
            f"lends {micro_batches}": Case(te_run(prepare=lend_only(*micro_batches), **settings))
            for micro_batches in ((0,), (3,), (0, 2), (1, 3))
        },
        timeout=120,
    )


def test_four_ranks():
    run = te_run(Layout(ep=2, etp=2, dp=4), config=FUSED)
    compare_all(
        {
            "expert tensor parallel": Case(run),
            "refetched": Case(te_run(Layout(ep=2, etp=2, dp=4)), REFETCH),
            "tensor parallel": Case(te_run(Layout(tp=2, ep=2, etp=2), config=FUSED)),
            "replicas": Case(te_run(Layout(ep=2, dp=4), config=FUSED, ddp=OVERLAP, steps=3)),
        },
        timeout=200,
    )


def test_the_number_of_gemms(gemms):
    run = te_run(routing="hot", steps=1, config=FUSED)

    def work(rank, size):
        del gemms[:]
        loans = train_with_llep(run).observed
        assert loans.fallbacks == 0
        assert loans.transfers > 0
        return Counter(gemms)

    native, layers, micro_batches, linears = 8 // 2, 2, 2, 2
    each = layers * micro_batches * linears
    layouts = ("TN", "NN", "NT")
    lender, borrower = run_ranks(work, 2)
    # The hot expert of layer 1 is on rank 0, that of layer 2 too: rank 1 borrows.
    assert lender == {(layout, native): each for layout in layouts}
    assert borrower == lender | {(layout, 1): each for layout in layouts}


OVERLAPPED = {
    "overlap_moe_expert_parallel_comm": True,
    # Megatron wants the flag; the numbers are fp32's.
    "bf16": True,
    "attention_softmax_in_fp32": False,
}
DELAYED = OVERLAPPED | {"delay_wgrad_compute": True}


def delayed(llep: LLEPConfig = EAGER, *, config: Mapping[str, Any] | None = None, **settings: Any):
    """Weight gradients are computed after backward, and reduced from there."""
    ddp = {"delay_wgrad_compute": True} | settings.pop("ddp", {})
    run = te_run(config=DELAYED | (config or {}), ddp=ddp, micro_batches=8, **settings)
    return Case(run, llep)


def test_delayed_weight_gradients():
    """TE writes a first micro-batch's fused gradients over what is in `main_grad`."""
    compare_all(
        {
            "not delayed": Case(te_run(config=FUSED | OVERLAPPED, ddp=OVERLAP, steps=3)),
            "delayed": delayed(),
            "fused": delayed(KEEP, config=FUSED, routing="hot", ddp=OVERLAP, steps=3),
            "fused, refetched": delayed(REFETCH, config=FUSED | SHARED, ddp=OVERLAP, steps=3),
            "biases": delayed(config=FUSED | {"add_bias_linear": True}, routing="one_rank"),
            "lends 0": delayed(config=FUSED, ddp=OVERLAP, prepare=lend_only(0)),
            "lends 1": delayed(config=FUSED, ddp=OVERLAP, prepare=lend_only(1)),
        },
        timeout=120,
    )


def test_delayed_weight_gradients_of_two_replicas():
    """Expert data parallelism of 2: what is reduced too early shows from the second step on."""
    replicas = Layout(ep=2, dp=4)
    compare_all(
        {
            "fused": delayed(layout=replicas, config=FUSED, ddp=OVERLAP, steps=3),
            "shards": delayed(
                replace(EAGER, scatter_from=2),
                layout=Layout(ep=4),
                config=FUSED,
                routing="one_rank",
                ddp=OVERLAP,
                steps=3,
            ),
        },
        timeout=120,
    )


FIRST_LAYER_IN_BF16 = {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0}


def choose_bf16(chunks: Chunks) -> None:
    """For the experts of the first layer, as --te-precision-config-file may."""
    for linear in chunks[0].decoder.layers[0].mlp.experts.children():
        linear.te_quant_params = TEQuantizationParams(TEQuantizationRecipe(), None)


def test_fp8(monkeypatch):
    """With scales that do not depend on which tokens share a slot, as close as without FP8."""
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: make_fp8_recipe(64.0))
    # In fp32 but for the GEMMs: bf16's rounding would be magnified by theirs.
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    mixed = {"config": FUSED | fp8, "steps": 3, "micro_batches": 8, "routing": "hot"}

    compare_all(
        {
            "kept": Case(te_run(config=FUSED | fp8), KEEP),
            "refetched": Case(te_run(config=FUSED | fp8 | recompute("moe_act")), REFETCH),
            "biases": Case(te_run(config=fp8 | {"add_bias_linear": True})),
            "first layer in bf16": Case(te_run(config=FUSED | fp8 | FIRST_LAYER_IN_BF16)),
            "experts in bf16": Case(te_run(config=FUSED | fp8, prepare=choose_bf16)),
            # A step's first forward renews TE's cached weights: once with a loan, once without.
            "lends 0": Case(te_run(prepare=lend_only(0), **mixed)),
            "lends 1": Case(te_run(prepare=lend_only(1), **mixed)),
        },
        timeout=200,
    )

    def work(rank, size):
        plain, precise = train(te_run(config=fp8)), train(te_run())
        return _apart(plain.gradients, precise.gradients)

    assert all(apart > 0.05 for apart in run_ranks(work, 2)), "FP8 was not on"


def _apart(actual: dict, expected: dict) -> float:
    """Relative difference of all gradients taken together."""
    apart = sum((actual[name] - expected[name]).double().square().sum() for name in expected)
    return float((apart / sum(e.double().square().sum() for e in expected.values())).sqrt())


def test_checkpoints_are_those_of_plain_megatron():
    run = te_run(steps=1, config=FUSED | {"add_bias_linear": True})

    def describe(chunks: Chunks) -> dict:
        state = chunks[0].sharded_state_dict()
        apply_factories(state)
        return {
            entry.key + str(getattr(entry, "global_offset", "")): (
                type(entry).__name__,
                entry.global_shape,
                entry.replica_id,
                getattr(entry, "dtype", None),
            )
            for entry in nested_values(state)
        }

    def work(rank, size):
        plain = train(run, observe=describe)
        lending = train(
            run, transform_model=lambda chunks: convert_model(chunks, EAGER), observe=describe
        )
        return plain.observed == lending.observed, len(plain.observed)

    for same, count in run_ranks(work, 2):
        assert same
        assert count > 40
