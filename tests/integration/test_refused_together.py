"""What one rank refuses, all refuse, and the model stays as it was."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_llep import LLEPConfig, convert_model, with_llep
from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.training import Chunks, Run, build_model, make_config

RUN = Run(layout=Layout(ep=2), config={"hidden_size": 32, "moe_ffn_hidden_size": 64})


class Special(MoELayer):
    pass


def make_special(chunks: Chunks) -> None:
    chunks[0].decoder.layers[1].mlp.__class__ = Special


def mark_as_sharded(chunks: Chunks) -> None:
    """As Megatron-FSDP does; what it shards is whole again within a forward."""
    weight = next(chunks[0].decoder.layers[1].mlp.experts.parameters())
    weight.__fsdp_param__ = True


def change_dtype(chunks: Chunks) -> None:
    chunks[0].decoder.layers[1].mlp.experts.local_experts[0].double()


def list_types(chunks: Chunks) -> list[type]:
    """Of all modules and token dispatchers."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    return [type(each) for each in modules] + [
        type(each.token_dispatcher) for each in modules if isinstance(each, MoELayer)
    ]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (make_special, "cannot convert a Special"),
        (mark_as_sharded, r"FSDP shards .* use Megatron's DDP"),
        (change_dtype, "not alike: .* the same dtype"),
    ],
)
def test_one_ranks_refusal_is_that_of_all(spoil, reason):
    def work(rank, size):
        with use_layout(RUN.layout):
            chunks = build_model(make_config(RUN), RUN)
            if rank == 1:
                spoil(chunks)
            before = list_types(chunks)
            with pytest.raises(ValueError, match=reason) as error:
                convert_model(chunks, replace(EAGER, expert_gemm="grouped_mm"))
            assert list_types(chunks) == before
            return str(error.value)

    messages = run_ranks(work, 2)
    assert messages[0] == messages[1]
    assert "decoder.layers.1.mlp of chunk 0" in messages[0]
    assert "rank 1 refuses it" in messages[0]


def test_a_subclass_in_a_specification():
    def work(rank, size):
        def transform(block):
            if rank == 1:
                block.layer_specs[1].submodules.mlp = Special
            return with_llep(block, EAGER)

        refused = pytest.raises(ValueError, match=r"cannot convert a Special.* rank 1 refuses it")
        with use_layout(RUN.layout), refused:
            build_model(make_config(RUN), RUN, transform)

    run_ranks(work, 2)


def switch_on_spec(chunks: Chunks, llep: LLEPConfig) -> None:
    build_model(make_config(RUN), RUN, lambda spec: with_llep(spec, llep))


@pytest.mark.parametrize("switch_on", [convert_model, switch_on_spec])
@pytest.mark.parametrize("other", [LLEPConfig(planner="lla"), LLEPConfig(enabled=False)])
def test_settings_are_compared_by_whoever_switches_on(switch_on, other):
    def work(rank, size):
        llep = LLEPConfig() if rank else other
        with use_layout(RUN.layout):
            chunks = build_model(make_config(RUN), RUN)
            with pytest.raises(ValueError, match="differ between ranks"):
                switch_on(chunks, llep)
            assert not any(isinstance(each, LLEPMoELayer) for each in chunks[0].modules())

    run_ranks(work, 2)


def test_too_early():
    with pytest.raises(ValueError, match=r"call with_llep after init_process_group"):
        with_llep(MoELayer, EAGER)
    with pytest.raises(ValueError, match=r"call convert_model after init_process_group"):
        convert_model([torch.nn.Linear(1, 1)], EAGER)
    off = LLEPConfig(enabled=False)
    assert with_llep(MoELayer, off) is MoELayer
    assert convert_model([], off) == []

    def work(rank, size):
        with pytest.raises(ValueError, match="after initialize_model_parallel"):
            with_llep(MoELayer, EAGER)
        with pytest.raises(ValueError, match="after initialize_model_parallel"):
            # Only one rank has a layer.
            with_llep(MoELayer if rank else torch.nn.Linear, EAGER)

    run_ranks(work, 2)


def test_the_models_own_groups_are_used():
    """Under decentralised groups, Megatron's global ones may not exist."""

    def work(rank, size):
        from megatron.core import parallel_state

        with use_layout(RUN.layout):
            chunks = build_model(make_config(RUN), RUN)
            group = parallel_state.get_expert_model_parallel_group()
        assert parallel_state.get_expert_model_parallel_group(check_initialized=False) is None
        convert_model(chunks, EAGER)
        layer = chunks[0].decoder.layers[0].mlp
        assert layer.token_dispatcher.ep_group is group

    run_ranks(work, 2)
