"""Hugging Face folders that cannot work end with a ValueError, before any process group exists.

Parsed by Megatron's real parser; the flags of the shape are those of test_flags.py.
"""

import json
import sys

import pytest
import torch.distributed as dist
from hf_models import cut_in_shards, edit_config, make_qwen3_moe, read_weights, write_weights
from megatron.training.arguments import parse_args
from published import GPT_OSS_20B

from megatron_llep.training.hf import arguments
from megatron_llep.training.hf.arguments import add_hf_arguments, check_hf_arguments
from megatron_llep.training.hf.flags import flags_from_hf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_qwen3_moe(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def folder(model, tmp_path):
    """A copy that a test may break."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def check(monkeypatch):
    monkeypatch.setenv("RANK", "0")

    def run(*flags):
        argv = [str(flag) for flag in flags] + ["--transformer-impl", "local"]
        monkeypatch.setattr(sys, "argv", ["script", *argv, *flags_from_hf(argv)])
        check_hf_arguments(parse_args(add_hf_arguments))

    yield run
    assert not dist.is_initialized()


def test_a_good_command_line_passes(check, folder, tmp_path):
    check("--hf-load", folder, "--hf-save", tmp_path / "new" / "saved")
    check("--hf-config", folder, "--hf-save", tmp_path / "saved")
    check("--num-layers", 2)
    cut_in_shards(folder)
    check("--hf-load", folder)


def test_the_shape_may_be_given_without_weights(check, folder):
    (folder / "model.safetensors").unlink()
    check("--hf-config", folder)
    with pytest.raises(ValueError, match=r"--hf-load .*no weights \(\*.safetensors\)"):
        check("--hf-load", folder)


def test_weights_in_pickles_are_refused(check, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"write it again with save_pretrained"):
        check("--hf-load", folder)


def test_a_missing_shard_is_named(check, folder):
    cut_in_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards .* first is model-00002-of-00003"):
        check("--hf-load", folder)


def test_a_shard_that_is_cut_off_is_named(check, folder):
    cut_in_shards(folder)
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model-00003-of-00003.safetensors is cut off"):
        check("--hf-load", folder)


def test_a_pointer_of_git_lfs_is_named(check, folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file .* lfs"):
        check("--hf-load", folder)


def test_an_index_that_names_another_file_is_refused(check, folder):
    cut_in_shards(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00003.safetensors has no tensor"):
        check("--hf-load", folder)


OTHER_SIZES = {
    "fewer layers": ({"num_hidden_layers": 2}, "num_hidden_layers 2, .* layers up to 2"),
    "more layers": ({"num_hidden_layers": 4}, "num_hidden_layers 4, .* no layer 3"),
    "vocabulary": ({"vocab_size": 97}, r"weight has the size \(97, 32\)"),
    "heads": ({"num_attention_heads": 2}, r"[qo]_proj.weight has the size \(24, 32\)"),
    "groups": ({"num_key_value_heads": 4}, r"[kv]_proj.weight has the size \(48, 32\)"),
    "experts": ({"num_local_experts": 4}, r"gate.weight has the size \(4, 32\)"),
    "width": ({"moe_intermediate_size": 24}, r"experts.* has the size .*24"),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_weights_of_another_size_than_config_json_are_refused(name, check, folder):
    changes, message = OTHER_SIZES[name]
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        check("--hf-load", folder)


def test_names_of_another_kind_of_model_are_refused(check, folder):
    weights = {f"transformer.{name}": each for name, each in read_weights(folder).items()}
    write_weights(folder, [("model.safetensors", weights)])
    with pytest.raises(ValueError, match=r"no layer 0"):
        check("--hf-load", folder)


@pytest.mark.parametrize("package", ["transformers", "safetensors", "megatron.bridge"])
def test_a_package_that_is_missing_is_named(package, check, folder, monkeypatch):
    monkeypatch.setattr(arguments, "_is_installed", lambda name: name != package)
    with pytest.raises(ValueError, match=f"{package.replace('.', '-')} is not installed; .*pip"):
        check("--hf-load", folder)


def test_saving_needs_a_model_to_copy_the_configuration_of(check, tmp_path):
    with pytest.raises(ValueError, match=r"--hf-save .*--hf-config"):
        check("--hf-save", tmp_path / "saved")


def test_a_folder_that_is_not_empty_is_left_alone(check, folder, tmp_path):
    with pytest.raises(ValueError, match=r"--hf-save .* not empty"):
        check("--hf-load", folder, "--hf-save", folder)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--hf-save .* this is a file"):
        check("--hf-load", folder, "--hf-save", tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_refused(check, folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--hf-save .* cannot be written"):
        check("--hf-load", folder, "--hf-save", tmp_path / "file" / "saved")


def test_two_sources_of_weights_are_refused(check, folder):
    with pytest.raises(ValueError, match=r"--pretrained-checkpoint somewhere .* one of the two"):
        check("--hf-load", folder, "--pretrained-checkpoint", "somewhere")


def test_experts_of_gpt_oss_are_not_cut(check, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B))
    with pytest.raises(ValueError, match=r"--expert-tensor-parallel-size 2: .* set it to 1"):
        check("--hf-config", tmp_path, "--tensor-model-parallel-size", 2)
