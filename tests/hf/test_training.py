"""From a Hugging Face folder through training with LLEP to a Hugging Face folder."""

import torch
from hf_models import make_gpt_oss, make_qwen3_moe, read_logits, read_weights, write_weights
from hf_runs import train_hf

EP2 = ["--expert-model-parallel-size", 2]
OPTIMIZER = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def assert_transformers_agrees(folder, runs):
    expected = read_logits(folder, rows=max(run.row for run in runs) + 1)
    for run in runs:
        torch.testing.assert_close(run.logits[0], expected[run.row], atol=2e-6, rtol=1e-6)


def test_what_training_made_is_what_is_saved(tmp_path):
    """Also where the optimizer gathers parameters only when the next forward needs them."""
    folder = make_qwen3_moe(tmp_path / "model")
    flags = ["--hf-load", folder, "--train-iters", 2, *EP2, *OPTIMIZER]
    runs = train_hf(2, [*flags, "--hf-save", tmp_path / "saved"])
    assert_transformers_agrees(tmp_path / "saved", runs)
    start = read_logits(folder, rows=2)
    assert all((run.logits[0] - start[run.row]).abs().max() > 1e-2 for run in runs)


def test_a_checkpoint_goes_before_the_folder(tmp_path):
    folder = make_gpt_oss(tmp_path / "model", num_hidden_layers=2)
    other = make_gpt_oss(tmp_path / "other", num_hidden_layers=2, seed=2)
    common = ["--train-iters", 1, *EP2]
    checkpoint = ["--save", tmp_path / "checkpoint", "--save-interval", 1]
    first = train_hf(2, ["--hf-load", folder, *common, *checkpoint])
    weights = read_weights(other)
    del weights["model.norm.weight"]  # so that reading it would fail
    write_weights(other, [("model.safetensors", weights)])
    flags = ["--load", tmp_path / "checkpoint", "--hf-load", other, *common]
    resumed = train_hf(2, [*flags, "--hf-save", tmp_path / "saved"])
    for run, before in zip(resumed, first, strict=True):
        torch.testing.assert_close(run.logits, before.logits)
    assert_transformers_agrees(tmp_path / "saved", resumed)


def test_the_shape_alone_can_be_taken(tmp_path):
    folder = make_qwen3_moe(tmp_path / "model")
    flags = ["--hf-config", folder, "--train-iters", 1, *EP2]
    runs = train_hf(2, [*flags, "--hf-save", tmp_path / "saved"])
    assert_transformers_agrees(tmp_path / "saved", runs)
