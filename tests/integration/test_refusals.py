"""Models and layers that LLEP refuses, by flag, at start-up."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.enums import Fp4Recipe
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_llep.integration.convert import convert_model
from megatron_llep.validation import check_config, check_layer, check_same_on_all_ranks
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.training import Run, build_model, make_config


def config_with(**changes) -> SimpleNamespace:
    """A supported configuration, but for the given fields."""
    fields = {name: getattr(SUPPORTED, name) for name in vars(SUPPORTED)}
    return SimpleNamespace(**(fields | changes))


SUPPORTED = make_config(Run(layout=Layout(ep=2)))
GROUPED_FP8 = {"fp8": "hybrid", "moe_grouped_gemm": True}


def test_the_supported_configuration_passes():
    check_config(SUPPORTED, EAGER)
    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        check_config(config_with(**GROUPED_FP8, fp8_recipe=recipe, fp8_param=True), EAGER)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"num_moe_experts": None}, "--num-experts"),
        ({"num_moe_experts": 7}, "--num-experts 7"),
        ({"moe_pad_expert_input_to_capacity": True}, "--moe-pad-expert-input-to-capacity"),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, "--fp8-format hybrid"),
        (GROUPED_FP8 | {"fp8_recipe": "delayed"}, "--fp8-recipe delayed"),
        (GROUPED_FP8 | {"fp8_recipe": "custom"}, "--fp8-recipe custom"),
        ({"use_kitchen": True}, "--kitchen-config-file"),
        ({"moe_single_grouped_weight": True}, "--moe-single-grouped-weight"),
        ({"moe_single_grouped_bias": True}, "--moe-single-grouped-bias"),
        ({"expert_gtp_weight_remat_size": 2}, "--expert-tensor-parallel-num-weight-shards"),
        ({"fp4": "e2m1"}, "--fp4-format e2m1"),
        ({"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-modules of whole layers"),
        ({"cpu_offloading": True}, "--cpu-offloading-num-layers"),
        ({"transformer_impl": "inference_optimized"}, "--transformer-impl inference_optimized"),
        (
            {"moe_pad_experts_for_cuda_graph_inference": True},
            "--moe-pad-experts-for-cuda-graph-inference",
        ),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
    ],
)
def test_unsupported_settings_name_flag_and_remedy(changes, flag):
    with pytest.raises(ValueError, match=r"leave|use|set|must|train") as error:
        check_config(config_with(**changes), EAGER)
    assert flag in str(error.value)


def test_of_a_configuration_the_field_is_named_too():
    changes = {"moe_single_grouped_weight": True}
    with pytest.raises(ValueError, match="leave the flag out") as error:
        check_config(config_with(**changes), EAGER)
    assert "(in Python the field is SimpleNamespace.moe_single_grouped_weight)" in str(error.value)
    with pytest.raises(ValueError, match="leave the flag out") as error:
        check_config(Namespace(**vars(config_with(**changes))), EAGER)
    assert "in Python" not in str(error.value)


FLEX_EP = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
HYBRIDEP = FLEX_EP | {"moe_flex_dispatcher_backend": "hybridep"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "--moe-token-dispatcher-type alltoall"),
        (
            FLEX_EP | {"moe_flex_dispatcher_backend": "ncclep"},
            "--moe-flex-dispatcher-backend ncclep",
        ),
        # Neither package is installed here.
        (FLEX_EP, "--moe-flex-dispatcher-backend deepep needs"),
        (HYBRIDEP, "--moe-flex-dispatcher-backend hybridep needs"),
        (FLEX_EP | {"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel"),
        (HYBRIDEP | GROUPED_FP8 | {"fp8_recipe": "blockwise"}, "--fp8-format hybrid"),
    ],
)
def test_the_flex_dispatcher_without_what_it_needs(changes, named):
    with pytest.raises(ValueError, match=r"--moe-llep-dispatcher flex.* leave") as error:
        check_config(config_with(**changes), replace(EAGER, dispatcher="flex"))
    assert named in str(error.value)


def test_replicas_with_one_buffer_for_the_process():
    llep = replace(EAGER, dispatcher="flex", replicas="expert-dp")
    with pytest.raises(ValueError, match=r"--moe-llep-replicas expert-dp: .* use deepep"):
        check_config(config_with(**HYBRIDEP), llep)


def test_back_ends_that_differ_between_ranks():
    def work(rank, size):
        from megatron.core.transformer.moe import fused_a2a

        fused_a2a.HAVE_DEEP_EP = rank == 1
        with pytest.raises(ValueError, match=r"--moe-llep-dispatcher: .*none.*deepep"):
            check_same_on_all_ranks(replace(EAGER, dispatcher="flex"))

    run_ranks(work, 2)


def test_more_foreign_slots_than_experts():
    with pytest.raises(ValueError, match="--moe-llep-max-foreign-experts 5: a rank hosts 4"):
        check_config(SUPPORTED, replace(EAGER, max_foreign_experts=5))
    check_config(SUPPORTED, replace(EAGER, max_foreign_experts=4))


def test_experts_of_another_kind():
    layer = SimpleNamespace(config=SUPPORTED, experts=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"--moe-llep: .* not of Linear"):
        check_layer(layer, EAGER)


def test_fp8_needs_experts_that_quantise():
    config = config_with(**GROUPED_FP8, fp8_recipe="tensorwise")
    experts = SequentialMLP.__new__(SequentialMLP)
    torch.nn.Module.__init__(experts)
    experts.num_local_experts, experts.local_experts = 1, [torch.nn.Linear(1, 1)]
    with pytest.raises(ValueError, match=r"--fp8-format hybrid: .* SequentialMLP; use"):
        check_layer(SimpleNamespace(config=config, experts=experts), EAGER)


@pytest.mark.parametrize(
    ("training", "evaluation", "refused"),
    [
        ({}, None, ""),  # bf16
        ({"fp8": "blockwise"}, None, "blockwise for experts.local_experts.0"),
        ({}, {"fp4": Fp4Recipe.nvfp4}, "nvfp4 for experts.local_experts.0"),
    ],
)
def test_a_file_that_quantises_single_experts(training, evaluation, refused):
    def choose(fp8=None, fp4=None):
        return SimpleNamespace(fp8_quantization_recipe=fp8, fp4_quantization_recipe=fp4)

    expert = torch.nn.Linear(1, 1)
    expert.te_quant_params = SimpleNamespace(
        training_recipe=choose(**training),
        evaluation_recipe=None if evaluation is None else choose(**evaluation),
    )
    experts = SequentialMLP.__new__(SequentialMLP)
    torch.nn.Module.__init__(experts)
    experts.num_local_experts, experts.local_experts = 1, torch.nn.ModuleList([expert])
    layer = SimpleNamespace(config=SUPPORTED, experts=experts)
    if not refused:
        check_layer(layer, EAGER)
        return
    with pytest.raises(ValueError, match=f"--te-precision-config-file: it chooses {refused}"):
        check_layer(layer, EAGER)


def test_grouped_experts_that_are_not_transformer_engines():
    experts = TEGroupedMLP.__new__(TEGroupedMLP)
    torch.nn.Module.__init__(experts)
    experts.num_local_experts = 1
    experts.linear_fc1 = experts.linear_fc2 = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"--moe-llep: .* not of Linear; use"):
        check_layer(SimpleNamespace(config=SUPPORTED, experts=experts), EAGER)


def test_a_subclass_of_the_moe_layer_is_not_converted():
    class Special(MoELayer):
        pass

    def work(rank, size):
        run = Run(layout=Layout(ep=2))
        with use_layout(run.layout):
            chunks = build_model(make_config(run), run)
            chunks[0].decoder.layers[0].mlp.__class__ = Special
            with pytest.raises(ValueError, match="cannot convert a Special"):
                convert_model(chunks, EAGER)

    run_ranks(work, 2)


def test_what_built_layers_keep_is_not_replaced():
    flag = "--overlap-dispatch-backward-with-experts-wgrad"

    def work(rank, size):
        run = Run(layout=Layout(ep=2))
        with use_layout(run.layout):
            chunks = build_model(make_config(run), run)
            chunks[0].config.overlap_dispatch_backward_with_experts_wgrad = True
            with pytest.raises(ValueError, match=f"{flag}: .* leave the flag out"):
                convert_model(chunks, EAGER)

    run_ranks(work, 2)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"planner": "lla"}, "--moe-llep-planner"), ({"enabled": False}, "--moe-llep")],
)
def test_settings_that_differ_between_ranks(changes, flag):
    def work(rank, size):
        llep = replace(EAGER, **changes) if rank == 1 else EAGER
        with pytest.raises(ValueError, match="differ between ranks") as error:
            check_same_on_all_ranks(llep)
        return str(error.value)

    messages = run_ranks(work, 3, timeout=20)
    assert len(set(messages)) == 1
    assert f"{flag}: [" in messages[0]
    run_ranks(lambda rank, size: check_same_on_all_ranks(EAGER), 3, timeout=20)
