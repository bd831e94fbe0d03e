"""A specification of any shape: LLEP's layer stands wherever Megatron's stood."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_llep import with_llep
from megatron_llep.integration.mtp_layers import NumberedMTPLayer, with_numbered_mtp
from megatron_llep.integration.replace_layers import replace_moe_layers
from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.training import Run, build_model, make_config

SETTINGS = {"llep": EAGER, "shared": None}
MOE = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)


class Special(MoELayer):
    pass


@dataclass
class Stack:
    """Of whatever kinds of layers."""

    dense_layer: Any = TransformerLayer
    moe_layer: Any = None
    others: dict[str, Any] = field(default_factory=dict)


def make_layer(mlp: Any) -> ModuleSpec:
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(mlp=mlp))


def test_of_a_hybrid_stack_the_moe_layers_alone_are_replaced():
    replaced = replace_moe_layers(hybrid_stack_spec, SETTINGS)
    before, after = vars(hybrid_stack_spec.submodules), vars(replaced.submodules)
    assert [name for name in after if after[name] is not before[name]] == ["moe_layer"]
    plain, ours = before["moe_layer"].submodules.mlp, after["moe_layer"].submodules.mlp
    assert plain.func is MoELayer
    assert ours.func is LLEPMoELayer
    assert ours.keywords == {**plain.keywords, **SETTINGS}


@pytest.mark.parametrize(
    ("spec", "find"),
    [
        (TransformerBlockSubmodules([make_layer(MOE)]), lambda s: s.layer_specs[0].submodules.mlp),
        (partial(build_module, make_layer(MOE)), lambda s: s.args[0].submodules.mlp),
        (partial(build_module, mlp=MOE), lambda s: s.keywords["mlp"]),
        (Stack(others={"expert pool": (MOE,)}), lambda s: s.others["expert pool"][0]),
        (MoELayer, lambda s: s),
    ],
)
def test_it_may_stand_anywhere(spec, find):
    assert find(replace_moe_layers(spec, SETTINGS)).func is LLEPMoELayer
    assert find(spec) is MOE or spec is MoELayer


@pytest.mark.parametrize(
    "module", [MoELayer, ("megatron.core.transformer.moe.moe_layer", "MoELayer")]
)
def test_a_module_specification_stays_one(module):
    """What builds it may take nothing else."""
    spec = ModuleSpec(module=module, params={"name": "mlp"}, submodules=MOE.keywords["submodules"])
    replaced = replace_moe_layers(spec, SETTINGS)
    assert replaced.module is LLEPMoELayer
    assert replaced.params == {"name": "mlp", **SETTINGS}
    assert replaced.submodules is spec.submodules
    assert spec.params == {"name": "mlp"}


@pytest.mark.parametrize(
    "spec",
    [
        make_layer(None),
        TransformerBlockSubmodules([make_layer(None)]),
        Stack(),
        ModuleSpec(module=object, submodules=object()),
        replace_moe_layers(make_layer(MOE), SETTINGS),
    ],
)
def test_one_without_moe_layers_is_left_as_it_is(spec):
    assert replace_moe_layers(spec, SETTINGS) is spec


@pytest.mark.parametrize("mlp", [Special, partial(Special), ModuleSpec(module=Special)])
def test_a_subclass_is_refused_by_name_and_place(mlp):
    with pytest.raises(ValueError, match=r"cannot convert a Special \(.*layer_specs, 0, .*mlp\)"):
        replace_moe_layers(TransformerBlockSubmodules([make_layer(mlp)]), SETTINGS)


def test_layers_of_a_copied_specification_share_what_they_lend_with():
    def work(rank, size):
        run = Run(layout=Layout(ep=2))
        with use_layout(run.layout):
            specs = []

            def transform(spec):
                specs.append(copy.deepcopy(specs[0]) if specs else with_llep(spec, EAGER))
                return specs[-1]

            built = [build_model(make_config(run), run, transform) for _ in range(2)]
            layers = [chunks[0].decoder.layers[n].mlp for chunks in built for n in range(2)]
            assert len({id(layer.shared_lending) for layer in layers}) == 1
            assert len({id(layer.lending_group) for layer in layers}) == 1

    run_ranks(work, 2)


def test_of_a_hybrid_stack_multi_token_prediction_numbers_itself():
    numbered = with_numbered_mtp(hybrid_stack_spec)
    before, after = (
        [layer.module for layer in spec.submodules.mtp_block_spec.submodules.layer_specs]
        for spec in (hybrid_stack_spec, numbered)
    )
    assert before == [MultiTokenPredictionLayer]
    assert after == [NumberedMTPLayer]
    assert with_numbered_mtp(numbered.submodules.moe_layer) is numbered.submodules.moe_layer
