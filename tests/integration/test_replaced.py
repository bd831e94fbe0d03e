"""Settings of Megatron in whose place LLEP does something else, and says so."""

import argparse
import contextlib
import dataclasses
import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import skip_routed_expert_padding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_llep.compat.settings import refused_by
from megatron_llep.experts.te_grouped import leave_fused_operations
from megatron_llep.integration.convert import convert_model, with_llep
from megatron_llep.integration.settings.table import (
    SETTINGS,
    find_notices,
    find_refusals,
    replace_in_loop,
    replace_settings,
)
from support.layout import Layout, use_layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, build_model, make_config, train
from support.versions import ABSENT_SETTINGS

EP2 = Layout(ep=2)


def config_with(**changes) -> SimpleNamespace:
    """As of a model with MoE layers, with fields that Megatron would not take without a GPU."""
    return SimpleNamespace(**(vars(make_config(Run(layout=EP2))) | changes))


@pytest.mark.parametrize(
    ("changes", "flag", "runs"),
    [
        (
            {"moe_token_dispatcher_type": "allgather"},
            "--moe-token-dispatcher-type allgather",
            {"moe_token_dispatcher_type": "alltoall"},
        ),
        (
            {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
            "--moe-token-dispatcher-type flex",
            {"moe_token_dispatcher_type": "alltoall"},
        ),
        ({"moe_enable_deepep": True}, "--moe-enable-deepep", {"moe_enable_deepep": False}),
        ({"moe_permute_fusion": True}, "--moe-permute-fusion", {"moe_permute_fusion": False}),
        (
            {"moe_permute_fusion_into_hybridep": True},
            "--moe-permute-fusion-into-hybridep",
            {"moe_permute_fusion_into_hybridep": False},
        ),
        (
            {"moe_router_padding_for_quantization": True},
            "--moe-router-padding-for-quantization",
            {"moe_router_padding_for_quantization": False, "moe_router_padding_for_fp8": False},
        ),
        (
            {"use_transformer_engine_op_fuser": True},
            "--use-transformer-engine-op-fuser",
            {"use_transformer_engine_op_fuser": True},
        ),
        (
            {"moe_expert_rank_capacity_factor": 1.5},
            "--moe-expert-rank-capacity-factor 1.5",
            {"moe_expert_rank_capacity_factor": None},
        ),
        ({"moe_paged_stash": True}, "--moe-paged-stash", {"moe_paged_stash": False}),
        (
            {"overlap_dispatch_backward_with_experts_wgrad": True},
            "--overlap-dispatch-backward-with-experts-wgrad",
            {"overlap_dispatch_backward_with_experts_wgrad": False},
        ),
    ],
)
def test_one_line_each_and_the_configuration_says_what_runs(changes, flag, runs):
    config = config_with(**changes)
    assert not list(find_refusals(config))
    (line,) = replace_settings(config)
    assert line.startswith(f"{flag}: ")
    assert {name: getattr(config, name) for name in runs} == runs
    # Else experts would take rows that nobody has padded for their FP8 kernels.
    assert not skip_routed_expert_padding(config)


def test_arguments_say_what_megatrons_loop_reads_there():
    args = argparse.Namespace(
        cuda_graph_impl="none",
        cuda_graph_modules=[],
        moe_expert_rank_capacity_factor=1.5,
        moe_token_dispatcher_type="flex",
    )
    replace_in_loop(args)
    assert args.moe_expert_rank_capacity_factor is None
    assert args.moe_token_dispatcher_type == "flex"


def test_flex_with_all_that_belongs_to_it():
    flex = config_with(
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="hybridep",
        moe_permute_fusion=True,
        moe_permute_fusion_into_hybridep=True,
    )
    assert len(replace_settings(flex)) == 3
    assert replace_settings(flex) == []
    assert find_notices(config_with()) == []


def test_flex_stays_where_it_is_asked_for():
    flex = config_with(
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="hybridep",
        moe_permute_fusion=True,
        moe_permute_fusion_into_hybridep=True,
    )
    (line,) = replace_settings(flex, "flex")
    assert line.startswith("--moe-permute-fusion: ")
    assert flex.moe_token_dispatcher_type == "flex"
    assert flex.moe_flex_dispatcher_backend == "hybridep"
    assert flex.moe_permute_fusion_into_hybridep


def test_every_setting_is_one_of_megatrons():
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = vars(parser.parse_args([])) | {
        field.name: None for field in dataclasses.fields(TransformerConfig)
    }
    for setting in SETTINGS:
        for name in [setting.name, *setting.runs] if setting.name else []:
            assert (name in known) != (name in ABSENT_SETTINGS)
        if flag := setting.flag:
            assert (flag in parser._option_string_actions) != (flag in ABSENT_SETTINGS)


def test_what_a_new_megatron_brings_is_refused():
    assert refused_by((0, 19)) == []
    assert [name for name, _, _ in refused_by((0, 20))] == [
        "moe_use_grouped_tensor",
        "batch_invariant_mode",
    ]
    assert refused_by((0, 21)) == refused_by((0, 20))


def test_experts_leave_transformer_engines_fused_operations():
    padding = SimpleNamespace(align_size=256)
    experts = SimpleNamespace(_with_fused_impl=True, quantization_padding=padding)
    leave_fused_operations(experts)
    assert not experts._with_fused_impl
    assert padding.align_size is None


def switch_on_with_permute_fusion(chunks: Chunks) -> None:
    """As on a machine with Transformer Engine, without which Megatron has no such kernel."""
    config = chunks[0].config
    config.moe_permute_fusion = True
    convert_model(chunks, EAGER)
    assert not config.moe_permute_fusion


def test_built_layers_train_as_plain():
    hot = Run(layout=EP2, routing=Routing("hot"))
    allgather = replace(hot, config={"moe_token_dispatcher_type": "allgather"})
    shared = allgather.config | {"moe_shared_expert_intermediate_size": 32}
    compare_all({"allgather": Case(allgather), "shared": Case(replace(allgather, config=shared))})

    def work(rank, size):
        with use_layout(EP2):
            plain = train(hot)
            assert_same_run(train(hot, transform_model=switch_on_with_permute_fusion), plain)
            with contextlib.redirect_stdout(io.StringIO()) as told:
                lending = train_with_llep(allgather, seam="spec")
            assert lending.observed.transfers > 0
            assert_same_run(lending, train(allgather))
        return told.getvalue()

    told, nothing = run_ranks(work, 2)
    assert told.count("--moe-token-dispatcher-type allgather: ") == 1
    assert nothing == ""


def test_rank_0_tells_once_what_concerns_other_stages():
    layout = Layout(pp=2, ep=2)
    run = Run(
        layout=layout,
        config={"moe_layer_freq": [0, 1], "moe_token_dispatcher_type": "allgather"},
    )

    def work(rank, size):
        with use_layout(layout), contextlib.redirect_stdout(io.StringIO()) as told:
            chunks = build_model(make_config(run), run)
            convert_model(chunks, EAGER)
            assert chunks[0].config.moe_token_dispatcher_type == "alltoall"
        return told.getvalue().splitlines()

    told, *others = run_ranks(work, 4)
    assert len(told) == 2  # a heading and a line
    assert others == [[], [], []]


@pytest.mark.parametrize("seam", ["model", "spec"])
def test_nobody_to_lend_to(seam):
    """By the groups. Every rank has all experts and its own tokens, so replicas change nothing."""
    run = Run(layout=Layout(dp=2), config={"moe_token_dispatcher_type": "allgather"})

    def work(rank, size):
        with use_layout(run.layout):
            plain = train(run)
            with contextlib.redirect_stdout(io.StringIO()) as told:
                mine = train_with_llep(run, replace(EAGER, replicas="expert-dp"), seam)
                with_llep(MoELayer, EAGER)  # as of another chunk
            assert_same_run(mine, plain, loss_tolerance=0, gradient_tolerance=0)
            assert mine.observed.plans == 0
        return told.getvalue()

    told, nothing = run_ranks(work, 2)
    assert told.count("nobody to lend to") == 1
    assert "dispatcher" not in told
    assert nothing == ""
