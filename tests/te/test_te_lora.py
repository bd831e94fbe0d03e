"""Transformer Engine's experts with adapters (LoRA) train as plain Megatron's with the same ones.

TE's kernels are stand-ins here, and so are the adapters.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformer_engine.pytorch")

from megatron.core.extensions.transformer_engine import TEGroupedLinear
from te_experts import TE_CONFIG, use_te_experts

from megatron_llep import convert_model
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.lora import Lora
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, build_model, make_config, make_tokens

pytestmark = pytest.mark.te

EP2 = Layout(ep=2)
REFETCH = replace(EAGER, foreign_weights="refetch")
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
FUSED = {"gradient_accumulation_fusion": True}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
MOE_ACT = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000}


class GroupedPeftLinear(nn.Module):
    """As ms-swift's LoraParallelLinear around a grouped linear: both halves are grouped too."""

    def __init__(self, base: TEGroupedLinear, lora: Lora):
        super().__init__()
        self.base_layer, self.scaling = base, lora.alpha / lora.dim
        common = {
            "num_gemms": base.num_gemms,
            "parallel_mode": None,
            "config": base.config,
            "init_method": nn.init.zeros_,
            "bias": False,
            "skip_bias_add": False,
            "is_expert": True,
        }
        into = TEGroupedLinear(input_size=base.in_features, output_size=lora.dim, **common)
        out = TEGroupedLinear(input_size=lora.dim, output_size=base.out_features, **common)
        self.lora_A = nn.ModuleDict({"default": into})
        self.lora_B = nn.ModuleDict({"default": out})

    def forward(self, hidden, *args):
        output, bias = self.base_layer(hidden, *args)
        inner, _ = self.lora_A["default"](hidden, *args)
        added, _ = self.lora_B["default"](inner, *args)
        return output + added * self.scaling, bias


class GroupedPeft(Lora):
    def _wrap(self, linear, name):
        return GroupedPeftLinear(linear, self)


KINDS = {
    **{kind: Lora(kind) for kind in ("packed", "shared", "same", "split")},
    "peft": GroupedPeft(),
}


def make_run(lora: Lora, *, before: bool = False, **settings) -> Run:
    settings["config"] = TE_CONFIG | settings.get("config", {})
    order = {"build": lora.build} if before else {"prepare": lora.add}
    return Run(**({"layout": EP2} | settings), spec=use_te_experts, **order)


def test_in_both_orders():
    compare_all(
        {
            "packed, after": Case(make_run(KINDS["packed"])),
            "packed, before": Case(make_run(KINDS["packed"], before=True), REFETCH),
            "packed, trained": Case(make_run(replace(KINDS["packed"], frozen=False), config=FUSED)),
            "shared": Case(make_run(KINDS["shared"], routing=Routing("hot"))),
            "the same on all ranks": Case(make_run(KINDS["same"], steps=3)),
            "as ms-swift's": Case(make_run(KINDS["peft"]), REFETCH),
        },
        timeout=200,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    cases = {
        "recomputed": (EAGER, {"config": RECOMPUTE}),
        "activations recomputed": (REFETCH, {"config": MOE_ACT}),
        "fused": (REFETCH, {"config": FUSED}),
        "overlapped": (EAGER, {"ddp": OVERLAP, "steps": 4}),
        "one rank": (EAGER, {"routing": Routing("one_rank")}),
        "starved": (REFETCH, {"routing": Routing("starved"), "config": {"add_bias_linear": True}}),
    }
    compare_all(
        {
            f"{name}, {'before' if before else 'after'}, {'frozen' if frozen else 'trained'}": Case(
                make_run(replace(KINDS[kind], frozen=frozen), before=before, **settings), llep
            )
            for name, (llep, settings) in cases.items()
            for before in (True, False)
            for frozen in (True, False)
            if (kind, name) != ("same", "fused")  # refused: ranks drift apart in plain Megatron too
        },
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_expert_data_parallelism(kind):
    layout = Layout(ep=2, dp=4)
    compare_all(
        {
            "frozen": Case(make_run(KINDS[kind], layout=layout, ddp=OVERLAP)),
            "trained": Case(
                make_run(replace(KINDS[kind], frozen=False), layout=layout, ddp=OVERLAP)
            ),
        },
        timeout=400,
    )


def test_gradients_without_ddp():
    """They go to `grad`, also to that of a parameter of which each expert has a part."""

    def work(rank, size):
        with use_layout(EP2):
            for lora in (KINDS["packed"], KINDS["shared"]):
                run = make_run(lora)
                gradients = []
                for switch_on in (list, lambda chunks: convert_model(chunks, EAGER)):
                    (model,) = chunks = build_model(make_config(run), run)
                    lora.add(chunks)
                    switch_on(chunks)
                    tokens = make_tokens(run, 0, rank)[:, :-1]
                    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
                    model(tokens, positions, None).square().mean().backward()
                    gradients.append(
                        {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
                    )
                ours, theirs = reversed(gradients)
                for name, expected in theirs.items():
                    assert get_relative_difference(ours[name], expected) <= 1e-4, name

    run_ranks(work, 2)


def spoil_values(chunks: Chunks, rank: int) -> None:
    Lora("same").add(chunks)
    experts = chunks[0].decoder.layers[0].mlp.experts
    with torch.no_grad():
        experts.linear_fc2.adapter.linear_in.weight[0, 0] += rank


def hook_one_half(chunks: Chunks, rank: int) -> None:
    Lora("shared").add(chunks)
    chunks[0].decoder.layers[0].mlp.experts.linear_fc1.adapter.linear_in.weight.register_hook(abs)


def add_magnitudes(chunks: Chunks, rank: int) -> None:
    Lora("packed").add(chunks)
    adapter = chunks[0].decoder.layers[0].mlp.experts.linear_fc1.adapter
    adapter.weight_magnitude = nn.Parameter(torch.ones(1))


def add_shared(chunks: Chunks, rank: int) -> None:
    Lora("same").add(chunks)


REFUSED = {
    "values": (spoil_values, {}, r"linear_fc2.adapter.linear_in.weight has the values"),
    "half": (hook_one_half, {}, r"linear_fc1.adapter.linear_out.*share all of it or nothing"),
    "fused": (add_shared, FUSED, r"linear_fc1.adapter.linear_in.*a hook is to sum"),
    "magnitude": (add_magnitudes, {}, r"has adapter.weight_magnitude, which is no half"),
    "delayed": (
        lambda chunks, rank: Lora("packed").add(chunks),
        BF16 | {"delay_wgrad_compute": True, "overlap_moe_expert_parallel_comm": True},
        r"--delay-wgrad-compute: experts.linear_fc1 is a LoRALinear",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lent_is_refused_by_all_ranks_alike(name):
    change, config, match = REFUSED[name]

    def work(rank, size):
        run = Run(layout=EP2, config=TE_CONFIG | config, spec=use_te_experts)
        with use_layout(EP2):
            (model,) = chunks = convert_model(build_model(make_config(run), run), EAGER)
            change(chunks, rank)
            tokens = make_tokens(run, 0, rank)[:, :-1]
            with pytest.raises(ValueError, match=match) as error:
                model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        return str(error.value)

    one, other = run_ranks(work, 2)
    assert one == other
