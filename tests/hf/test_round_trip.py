"""Hugging Face folders in Megatron, with LLEP lending: the same logits, the same folder back."""

import errno
import json

import pytest
import torch
from hf_models import (
    cut_in_shards,
    edit_config,
    fuse_experts,
    make_deepseek_v3,
    make_gpt_oss,
    make_qwen3_moe,
    read_logits,
    read_weights,
    write_weights,
)
from hf_runs import run_hf
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_llep.training.hf.shard_writer import ShardWriter
from support.ranks import RankError

EP = "--expert-model-parallel-size"
TP = "--tensor-model-parallel-size"
PP = "--pipeline-model-parallel-size"
TP2_EP2 = [TP, 2, "--sequence-parallel", "--expert-tensor-parallel-size", 1, EP, 2]


def assert_same_weights(actual, expected):
    actual, expected = read_weights(actual), read_weights(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


def check_round_trip(folder, target, world_size, layout, *, timeout=60.0):
    runs = run_hf(world_size, ["--hf-load", folder, "--hf-save", target, *layout], timeout=timeout)
    expected = read_logits(folder, rows=max(run.row for run in runs) + 1)
    for run in runs:
        torch.testing.assert_close(run.logits[0], expected[run.row], atol=1e-6, rtol=1e-6)
    if world_size > 1:
        assert sum(run.lent for run in runs) > 0
    torch.testing.assert_close(read_logits(target, len(expected)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("make", [make_qwen3_moe, make_gpt_oss])
def test_logits_and_export_at_ep2(tmp_path, make):
    folder = make(tmp_path / "model")
    check_round_trip(folder, tmp_path / "saved", 2, [EP, 2])
    assert_same_weights(tmp_path / "saved", folder)


@pytest.mark.parametrize("make", [make_qwen3_moe, make_gpt_oss])
def test_logits_and_export_at_tp2_ep2(tmp_path, make):
    folder = make(tmp_path / "model")
    check_round_trip(folder, tmp_path / "saved", 2, TP2_EP2)
    assert_same_weights(tmp_path / "saved", folder)


MTP = ["--mtp-num-layers", 1]


@pytest.mark.parametrize(
    "layout", [[EP, 2], pytest.param(TP2_EP2, marks=pytest.mark.slow)], ids=["EP 2", "TP 2 x EP 2"]
)
def test_deepseek_with_multi_token_prediction(tmp_path, layout):
    folder = make_deepseek_v3(tmp_path / "model")
    check_round_trip(folder, tmp_path / "saved", 2, [*layout, *MTP])
    assert_same_weights(tmp_path / "saved", folder)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None, "n_group": 1, "topk_group": 1}])
def test_deepseek_without_multi_token_prediction(tmp_path, changes):
    folder = make_deepseek_v3(tmp_path / "model", **changes)
    check_round_trip(folder, tmp_path / "saved", 2, [EP, 2])
    expected = read_weights(folder)
    kept = {name: w for name, w in expected.items() if not name.startswith("model.layers.3.")}
    write_weights(folder, [("model.safetensors", kept)])
    assert_same_weights(tmp_path / "saved", folder)
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"]
        == 0
    )


FOUR_RANKS = {
    "gpt-oss, EP 4": (make_gpt_oss, [EP, 4], ()),
    "Qwen3-MoE, EP 4": (make_qwen3_moe, [EP, 4], pytest.mark.slow),
    "gpt-oss, TP 2 x EP 2, DP 2": (make_gpt_oss, TP2_EP2, pytest.mark.slow),
    "Qwen3-MoE, TP 2 x EP 2, DP 2": (make_qwen3_moe, TP2_EP2, pytest.mark.slow),
}


@pytest.mark.parametrize(
    ("make", "layout"),
    [pytest.param(*case[:2], marks=case[2], id=name) for name, case in FOUR_RANKS.items()],
)
def test_logits_and_export_on_four_ranks(tmp_path, make, layout):
    folder = make(tmp_path / "model")
    check_round_trip(folder, tmp_path / "saved", 4, layout, timeout=120.0)
    assert_same_weights(tmp_path / "saved", folder)


@pytest.mark.slow
def test_experts_cut_by_tensor_parallelism(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model")
    layout = [TP, 2, "--sequence-parallel", "--expert-tensor-parallel-size", 2, EP, 2]
    check_round_trip(folder, tmp_path / "saved", 4, layout, timeout=120.0)
    assert_same_weights(tmp_path / "saved", folder)


def test_a_folder_in_shards_with_an_index(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model")
    cut_in_shards(folder)
    check_round_trip(folder, tmp_path / "saved", 2, [EP, 2])
    assert_same_weights(tmp_path / "saved", folder)


def test_experts_in_one_tensor(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model")
    classic = make_qwen3_moe(tmp_path / "classic")
    fuse_experts(folder)
    check_round_trip(folder, tmp_path / "saved", 2, [EP, 2])
    assert_same_weights(tmp_path / "saved", classic)


def test_tied_embeddings_and_a_router_that_does_not_normalise(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model", tie_word_embeddings=True, norm_topk_prob=False)
    check_round_trip(folder, tmp_path / "saved", 2, [EP, 2])
    assert_same_weights(tmp_path / "saved", folder)


def test_a_config_as_older_transformers_wrote_it(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model")
    edit_config(
        folder,
        rope_parameters=None,
        rope_theta=100000.0,
        rope_scaling=None,
        dtype=None,
        torch_dtype="float32",
        num_local_experts=None,
        num_experts=8,
    )
    check_round_trip(folder, tmp_path / "saved", 1, [])


def test_a_vocabulary_that_tensor_parallelism_pads(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model", vocab_size=95)
    runs = run_hf(2, ["--hf-load", folder, "--hf-save", tmp_path / "saved", *TP2_EP2])
    assert runs[0].logits.shape[-1] == 96
    torch.testing.assert_close(runs[0].logits[..., :95], read_logits(folder, 1))
    assert_same_weights(tmp_path / "saved", folder)


@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages(tmp_path, tied):
    """The last stage has a copy of tied embeddings."""
    folder = make_qwen3_moe(tmp_path / "model", num_hidden_layers=4, tie_word_embeddings=tied)
    run_hf(2, ["--hf-load", folder, "--hf-save", tmp_path / "saved", PP, 2])
    assert_same_weights(tmp_path / "saved", folder)


def test_bfloat16_weights_in_a_bfloat16_model(tmp_path):
    folder = make_gpt_oss(tmp_path / "model", torch.bfloat16)
    run_hf(2, ["--hf-load", folder, "--hf-save", tmp_path / "saved", "--bf16", EP, 2])
    assert_same_weights(tmp_path / "saved", folder)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bfloat16_weights_trained_in_fp32_lose_nothing(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model", torch.bfloat16)
    check_round_trip(folder, tmp_path / "saved", 1, [])
    saved = read_weights(tmp_path / "saved")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"


def change_weights(folder, change):
    weights = read_weights(folder)
    change(weights)
    write_weights(folder, [("model.safetensors", weights)])


def quantize(weights):
    """Replace the experts by random MXFP4 ones, as the published gpt-oss has them."""
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        size = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, size, generator=generator, dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}


def test_mxfp4_experts_come_back_as_plain_numbers(tmp_path):
    folder, saved = tmp_path / "model", tmp_path / "saved"
    make_gpt_oss(folder, torch.bfloat16, hidden_size=64, intermediate_size=32)
    change_weights(folder, quantize)
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    runs = run_hf(2, ["--hf-load", folder, "--hf-save", saved, EP, 2])
    expected = read_logits(saved, rows=2)
    for run in runs:
        torch.testing.assert_close(run.logits[0], expected[run.row], atol=1e-6, rtol=1e-6)
    packed = read_weights(folder)
    for name, tensor in read_weights(saved).items():
        if f"{name}_blocks" in packed:
            parts = (packed[f"{name}_blocks"], packed[f"{name}_scales"])
            assert torch.equal(tensor, convert_moe_packed_tensors(*parts, dtype=torch.float32))
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())


def assert_both_ranks_raised(error):
    assert "rank 0 of 2 raised" in str(error.value)
    assert "rank 1 of 2 raised" in str(error.value)


def test_a_tensor_that_is_missing_is_told_by_all_ranks(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model")
    # An expert of rank 1 alone: rank 0 must not go on and wait for it.
    change_weights(folder, lambda w: w.pop("model.layers.2.mlp.experts.7.up_proj.weight"))
    with pytest.raises(RankError, match=r"--hf-load .* 1 parameters have no counterpart") as error:
        run_hf(2, ["--hf-load", folder, EP, 2])
    assert_both_ranks_raised(error)


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.bias"
    change_weights(folder, lambda w: w.update({name: torch.zeros(48)}))
    with pytest.raises(RankError, match=f"no place for 1 of its tensors, the first is {name}"):
        run_hf(1, ["--hf-load", folder])


def test_a_full_disk_ends_all_ranks(tmp_path, monkeypatch):
    """Rank 0 alone writes; the others must not wait for its part in the next tensor."""

    def fail(writer, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", fail)
    folder = make_qwen3_moe(tmp_path / "model")
    with pytest.raises(RankError, match=r"--hf-save .* No space left") as error:
        run_hf(2, ["--hf-load", folder, "--hf-save", tmp_path / "saved", EP, 2])
    assert_both_ranks_raised(error)
    assert str(error.value).count("No space left") >= 2
