"""Hugging Face folders in Megatron, with LLEP lending: the same logits, and the same folder back."""

import pytest
import torch
from hf_models import (
    cut_in_shards,
    edit_config,
    fuse_experts,
    make_gpt_oss,
    make_qwen3_moe,
    read_logits,
    read_weights,
)
from hf_runs import run_hf

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
    runs = run_hf(
        world_size, ["--hf-load", folder, "--hf-save", target, *layout], timeout=timeout
    )
    expected = read_logits(folder, rows=max(run.row for run in runs) + 1)
    for run in runs:
        torch.testing.assert_close(run.logits[0], expected[run.row], atol=1e-6, rtol=1e-6)
    assert sum(run.lent for run in runs) > 0
    torch.testing.assert_close(read_logits(target, len(expected)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("make", [make_qwen3_moe, make_gpt_oss])
def test_logits_and_export_at_ep2(tmp_path, make):
    folder = make(tmp_path / "model")
    check_round_trip(folder, tmp_path / "saved", 2, [EP, 2])
    assert_same_weights(tmp_path / "saved", folder)
