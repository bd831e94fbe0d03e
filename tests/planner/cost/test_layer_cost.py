"""The cost model in a Megatron layer: its shape, and ranks that read different files."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.planner.cost.layer import get_layer_cost
from megatron_llep.validation import check_same_on_all_ranks
from planner.cost.test_cost_model import MODEL
from support.ranks import run_ranks


def make_config(**settings) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=8,
        moe_ffn_hidden_size=24,
        moe_router_topk=2,
        add_bias_linear=False,
        **settings,
    )


def test_the_shape_is_the_layers(tmp_path):
    path = tmp_path / "cost.json"
    MODEL.save(path)
    llep = LLEPConfig(planner="auto", cost_model=str(path))
    cost = get_layer_cost(make_config(gated_linear_unit=True), llep)
    assert cost.model == MODEL
    assert cost.shape.expert_bytes == 3 * 16 * 24 * 4
    assert cost.shape.gradient_bytes == 3 * 16 * 24 * 4
    assert not cost.shape.refetch

    config = make_config(
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        pipeline_model_parallel_size=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_tensor_parallel_size=2,
    )
    cost = get_layer_cost(config, llep)
    assert cost.shape.expert_bytes == 2 * 16 * 12 * 2
    assert cost.shape.gradient_bytes == 2 * 16 * 12 * 4
    assert cost.shape.refetch
    cost = get_layer_cost(config, replace(llep, grad_dtype="param", foreign_weights="keep"))
    assert cost.shape.gradient_bytes == cost.shape.expert_bytes
    assert not cost.shape.refetch

    cost = get_layer_cost(make_config(gated_linear_unit=True, moe_latent_size=4), llep)
    assert cost.shape.expert_bytes == 3 * 4 * 24 * 4
    assert cost.shape.token_bytes == 4 * 4

    config.fp8_recipe, config.fp8_param = "blockwise", True
    cost = get_layer_cost(config, llep)
    assert cost.shape.expert_bytes == 2 * 16 * 12
    assert cost.shape.token_bytes == 16 * 2


def test_auto_needs_a_cost_model():
    with pytest.raises(ValueError, match=r"--moe-llep-planner auto.*--moe-llep-cost-model"):
        LLEPConfig(planner="auto")
    assert get_layer_cost(make_config(), LLEPConfig()) is None


@pytest.mark.parametrize("of_rank_1", [replace(MODEL, overlap=0.5), None], ids=["other", "none"])
def test_files_that_differ_between_ranks(tmp_path, of_rank_1):
    for rank, model in enumerate((MODEL, of_rank_1)):
        (tmp_path / str(rank)).mkdir()
        if model is not None:
            model.save(tmp_path / str(rank) / "cost.json")

    def work(rank, size):
        with pytest.MonkeyPatch.context() as monkeypatch:
            # The same path on both ranks, but a file of its own on each, as on two machines.
            monkeypatch.chdir(tmp_path / str(rank))
            llep = LLEPConfig(planner="auto", cost_model="cost.json")
            with pytest.raises(ValueError, match="--moe-llep-cost-model: ") as error:
                check_same_on_all_ranks(llep)
            return str(error.value)

    messages = run_ranks(work, 2, timeout=20)
    assert len(set(messages)) == 1
    assert MODEL.digest() in messages[0]
