"""One MoE layer in float64: outputs and gradients equal plain Megatron's to 1e-10.

Letters: T tokens of a rank, H hidden size.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from megatron_llep.planner.cost.presets import PRESETS
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks

TOLERANCE = 1e-10
H, T, E = 16, 48, 8


def build_layer(layout: Layout, rank: int, skew: float, **settings) -> MoELayer:
    """A layer whose router favours the experts of rank 0 by `skew`, the same on each call."""
    config = TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": H,
            "num_attention_heads": 2,
            "num_moe_experts": E,
            "moe_ffn_hidden_size": 24,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": layout.ep,
            "tensor_model_parallel_size": layout.tp,
            "expert_tensor_parallel_size": layout.expert_tp,
            "sequence_parallel": layout.tp > 1,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "bias_activation_fusion": False,
            "gradient_accumulation_fusion": False,
            "add_bias_linear": False,
            "params_dtype": torch.float64,
            **settings,
        }
    )
    layer = get_moe_module_spec(use_te=False, num_experts=E)(config=config, pg_collection=None)
    layer.set_layer_number(1)
    generator = torch.Generator().manual_seed(1000 + rank)
    for parameter in layer.experts.parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(draw * 0.2)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(E, H, generator=generator, dtype=torch.float64) * 0.3
    weight[: E // layout.ep] += skew
    layer.router.weight.data.copy_(weight)
    if layer.router.bias is not None:
        layer.router.bias.data.zero_()
    return layer


def run_layer(layer: MoELayer, rank: int, tokens: int) -> dict[str, torch.Tensor]:
    """Forward and backward on this rank's own tokens [T, 1, H]: output and all gradients."""
    generator = torch.Generator().manual_seed(2000 + rank)
    hidden = torch.rand(tokens, 1, H, generator=generator, dtype=torch.float64, requires_grad=True)
    output, _ = layer(hidden)
    weight = torch.rand(output.shape, generator=generator, dtype=torch.float64)
    (output * weight).sum().backward()
    found = {"output": output.detach(), "input gradient": hidden.grad}
    return found | {
        name: parameter.grad
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }


def compare_layers(rank, size, layout, llep, skew, token_counts, settings) -> int:
    """Run both layers and return how many foreign slots the plan used."""
    with use_layout(layout):
        plain = build_layer(layout, rank, skew, **settings)
        ours = build_layer(layout, rank, skew, **settings)
        convert_model([ours], llep)
        assert ours.state_dict().keys() == plain.state_dict().keys()
        planned: list[Planned] = []
        note_decisions([ours], planned)
        expected = run_layer(plain, rank, token_counts[rank])
        found = run_layer(ours, rank, token_counts[rank])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            difference = get_relative_difference(found[name], value) if value.numel() else 0.0
            assert difference <= TOLERANCE, f"{name} differs by {difference:.1e}"
        return planned[-1].plan.max_foreign


@pytest.mark.parametrize("planner", ["tolerant", "exact", "lla"])
@pytest.mark.parametrize("order", ["local_first", "rank_order"])
@pytest.mark.parametrize(
    "layout",
    [Layout(ep=2), Layout(ep=4), Layout(tp=2, ep=2, etp=2), Layout(tp=2, ep=2, etp=1)],
    ids=str,
)
def test_layer_equals_megatron(layout, planner, order):
    llep = replace(EAGER, planner=planner, token_assignment=order)
    size = layout.world_size
    slots = run_ranks(compare_layers, size, layout, llep, 1.0, [T] * size, {})
    assert all(slots)


@pytest.mark.parametrize("lend_to", ["any_node", "own_node"])
@pytest.mark.parametrize("order", ["local_first", "rank_order"])
def test_several_nodes(lend_to, order):
    llep = replace(EAGER, ranks_per_node=2, lend_to=lend_to, token_assignment=order)
    assert all(run_ranks(compare_layers, 4, Layout(ep=4), llep, 1.0, [T] * 4, {}))


@pytest.mark.parametrize("free", [True, False])
def test_auto_lends_where_its_cost_model_says_so(free, tmp_path):
    model = replace(
        PRESETS["h200"],
        flops_per_second=1e6 if free else 1e30,
        planning_seconds=0.0 if free else 1.0,
    )
    model.save(tmp_path / "machine.json")
    llep = LLEPConfig(planner="auto", cost_model=str(tmp_path / "machine.json"))
    slots = run_ranks(compare_layers, 2, Layout(ep=2), llep, 1.0, [T, T], {})
    assert all(slots) if free else not any(slots)


def test_experts_with_biases():
    settings = {"add_bias_linear": True}
    assert all(run_ranks(compare_layers, 2, Layout(ep=2), EAGER, 1.0, [T, T], settings))


def test_ragged_tokens():
    token_counts = [T, 4, 1, 3 * T]  # Megatron's router refuses a rank with none
    assert all(run_ranks(compare_layers, 4, Layout(ep=4), EAGER, 0.3, token_counts, {}))


@pytest.mark.parametrize("max_foreign", [0, 1])
def test_bound_on_foreign_experts(max_foreign):
    llep = replace(EAGER, max_foreign_experts=max_foreign)
    slots = run_ranks(compare_layers, 4, Layout(ep=4), llep, 1.0, [T] * 4, {})
    assert set(slots) == {max_foreign}


FROZEN = {
    "experts": lambda name: "experts" in name,
    "first linear layers": lambda name: "linear_fc1" in name,
    "router": lambda name: "router" in name,
    "everything": lambda name: True,
    "experts of rank 1": None,
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("input_needs_gradient", [True, False])
def test_frozen_parts(frozen, input_needs_gradient):
    def freeze(layer: MoELayer, rank: int) -> None:
        for name, parameter in layer.named_parameters():
            is_frozen = FROZEN[frozen] or (lambda name: rank == 1 and "experts" in name)
            parameter.requires_grad_(not is_frozen(name))

    def work(rank, size):
        with use_layout(Layout(ep=2)):
            results = []
            for llep in (None, EAGER):
                layer = build_layer(Layout(ep=2), rank, 1.0)
                if llep:
                    convert_model([layer], llep)
                freeze(layer, rank)
                generator = torch.Generator().manual_seed(rank)
                hidden = torch.rand(T, 1, H, generator=generator, dtype=torch.float64)
                hidden.requires_grad_(input_needs_gradient)
                output, _ = layer(hidden)
                if output.requires_grad:
                    output.square().sum().backward()
                grads = {name: p.grad for name, p in layer.named_parameters()}
                results.append({"output": output.detach(), "hidden": hidden.grad, **grads})
        plain, ours = results
        for name, value in plain.items():
            assert (value is None) == (ours[name] is None), name
            if value is not None:
                assert get_relative_difference(ours[name], value) <= TOLERANCE, name

    run_ranks(work, 2, timeout=30)


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_without_training(mode):
    def work(rank, size):
        with use_layout(Layout(ep=2)):
            outputs = []
            for convert in (lambda layers, llep: layers, convert_model):
                layer = build_layer(Layout(ep=2), rank, 1.0).train(mode != "eval")
                convert([layer], EAGER)
                generator = torch.Generator().manual_seed(rank)
                hidden = torch.rand(T, 1, H, generator=generator, dtype=torch.float64)
                with torch.set_grad_enabled(mode != "no_grad"):
                    outputs.append(layer(hidden)[0].detach())
            assert get_relative_difference(outputs[1], outputs[0]) <= TOLERANCE

    run_ranks(work, 2)


def test_gradients_accumulate_over_micro_batches():
    def work(rank, size):
        with use_layout(Layout(ep=2)):
            results = []
            for convert in (False, True):
                layer = build_layer(Layout(ep=2), rank, 1.0)
                if convert:
                    convert_model([layer], EAGER)
                # Two micro-batches in flight, backward in the order of forward.
                outputs = [layer(micro)[0] for micro in make_micro_batches(rank)]
                for output in outputs:
                    output.square().sum().backward()
                results.append({name: p.grad for name, p in layer.named_parameters()})
        for name, value in results[0].items():
            assert get_relative_difference(results[1][name], value) <= TOLERANCE, name

    run_ranks(work, 2)


make_tokens = partial(torch.rand, T, 1, H, dtype=torch.float64)


def make_micro_batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [make_tokens(generator=generator) for _ in range(3)]
