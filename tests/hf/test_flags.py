"""The shape of a config.json as Megatron flags, held against the recipes and the user's flags."""

import argparse
import functools
import json
import shlex
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments
from published import DEEPSEEK_V3, GPT_OSS_20B, PUBLISHED, QWEN3_30B_A3B, as_transformers_5

from megatron_llep.offline.launch.flags import format_flags, load_config
from megatron_llep.training.hf.flags import COMPARED, flags_from_hf

ROOT = Path(__file__).resolve().parents[2]

SMALL = QWEN3_30B_A3B | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "vocab_size": 95,
    "max_position_embeddings": 512,
}


@pytest.fixture
def folder(tmp_path):
    def write(config, **changes):
        kept = {k: v for k, v in (config | changes).items() if v != "removed"}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        return ["--hf-load", str(tmp_path)]

    return write


def recipe_flags(name):
    sections = load_config(ROOT / "configs" / f"{name}.yaml")
    merged = {flag: value for section in sections.values() for flag, value in section.items()}
    return format_flags(merged)


@functools.cache
def megatron_parser():
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def shape_of(words):
    """What Megatron's parser makes of the compared flags, if not its default."""
    keep, taking = [], False
    for word in words:
        if word.startswith("--"):
            taking = word in COMPARED
        if taking:
            keep.append(word)
    args, defaults = (vars(megatron_parser().parse_args(each)) for each in (keep, []))
    changed = {name: value for name, value in args.items() if value != defaults[name]}
    if changed.get("window_attn_skip_freq") == 2:
        changed["window_attn_skip_freq"] = [1, 0] * (args["num_layers"] // 2)
    # Of no meaning under latent attention, and where every layer has experts.
    without = ["kv_channels"] if args["multi_latent_attention"] else []
    without += ["ffn_hidden_size"] if args["moe_layer_freq"] == 1 else []
    return {name: value for name, value in changed.items() if name not in without}


@pytest.mark.parametrize("change", [dict, as_transformers_5], ids=["published", "transformers 5"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shape_is_that_of_the_recipe(name, change, folder):
    derived = shape_of(flags_from_hf(folder(change(PUBLISHED[name]))))
    recipe = shape_of(recipe_flags(name))
    assert derived == recipe


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_agrees_with_its_model_and_nothing_is_given_twice(name, folder):
    recipe = recipe_flags(name)
    added = flags_from_hf([*folder(PUBLISHED[name]), *recipe])
    assert not {word for word in added if word.startswith("--")} & set(recipe)


def test_no_folder_no_flags():
    assert flags_from_hf(["--num-layers", "4"]) == []


def test_what_the_user_gives_is_left_out(folder):
    given = [*folder(SMALL), "--num-layers", "2", "--hidden-dropout", "0.2"]
    added = flags_from_hf(given)
    assert "--num-layers" not in added
    assert "--hidden-dropout" not in added
    assert added[added.index("--attention-dropout") + 1] == "0.0"


def test_hf_config_gives_the_same_shape(folder):
    load = folder(SMALL)
    assert flags_from_hf(["--hf-config", load[1]]) == flags_from_hf(load)


def test_the_vocabulary_is_padded_for_tensor_parallelism_only(folder):
    def padded(*flags):
        added = flags_from_hf([*folder(SMALL), *flags])
        return added[added.index("--padded-vocab-size") + 1]

    assert padded() == "95"
    assert padded("--tensor-model-parallel-size", "2") == "96"


def test_layers_of_two_kinds_in_any_order(folder):
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 21
    added = flags_from_hf(folder(GPT_OSS_20B, layer_types=kinds))
    args = megatron_parser().parse_args(added)
    assert args.window_attn_skip_freq == [0] * 3 + [1] * 21
    assert args.window_size == (127, 0)


def test_tied_embeddings_and_a_router_without_normalising(folder):
    added = flags_from_hf(folder(SMALL, tie_word_embeddings=True, norm_topk_prob=False))
    assert "--untie-embeddings-and-output-weights" not in added
    assert "--moe-router-pre-softmax" in added


def test_the_tokenizer_of_the_folder_is_taken_unless_another_is_given(folder, tmp_path):
    load = folder(SMALL)
    assert "--tokenizer-type" not in flags_from_hf(load)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 94}}}))
    added = " ".join(flags_from_hf(load))
    assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}" in added
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "90"]
    assert "--tokenizer-model" not in flags_from_hf([*load, *null])
    other = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "Qwen/Qwen3"]
    assert "--tokenizer-model" not in flags_from_hf([*load, *other])


CONTRADICTIONS = {
    "--num-layers 3": ("--num-layers 3", "gives 2"),
    "--hidden-size=32": ("--hidden-size 32", "gives 64"),
    "--num-query-groups 8": ("--num-query-groups 8", "gives 4"),
    "--kv-channels 16": ("--kv-channels 16", "gives 128"),
    "--num-experts 16": ("--num-experts 16", "gives 8"),
    "--moe-router-topk 2": ("--moe-router-topk 2", "gives 8"),
    "--moe-ffn-hidden-size 1": ("--moe-ffn-hidden-size 1", "gives 768"),
    "--rotary-base 10000": ("--rotary-base 10000", "gives 1000000"),
    "--norm-epsilon 1e-5": ("--norm-epsilon 1e-05", "gives 1e-06"),
    "--position-embedding-type yarn": ("--position-embedding-type yarn", "gives rope"),
    "--padded-vocab-size 128": ("--padded-vocab-size 128", "gives 95"),
    "--vocab-size 96": ("--vocab-size 96", "vocab_size 95"),
    "--add-qkv-bias": ("--add-qkv-bias", "not that setting"),
    "--moe-layer-freq 2": ("--moe-layer-freq 2", "gives 1"),
    "--moe-router-score-function sigmoid": ("sigmoid", "gives softmax"),
    "--seq-length 1024": ("--seq-length 1024", "--max-position-embeddings 1024"),
    "--hf-config elsewhere": ("--hf-config elsewhere", "one of the two"),
}


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_a_flag_that_contradicts_the_model_is_refused(flags, folder):
    with pytest.raises(ValueError, match=r"--") as error:
        flags_from_hf([*folder(SMALL), *shlex.split(flags)])
    for part in CONTRADICTIONS[flags]:
        assert part in str(error.value)


def test_a_setting_that_the_model_lacks_is_refused(folder):
    with pytest.raises(ValueError, match=r"--untie-embeddings-and-output-weights: .* not that"):
        flags_from_hf(
            [*folder(SMALL, tie_word_embeddings=True), "--untie-embeddings-and-output-weights"]
        )
    with pytest.raises(ValueError, match=r"--disable-bias-linear: .* not that"):
        flags_from_hf([*folder(GPT_OSS_20B), "--disable-bias-linear"])


UNUSABLE = {
    "architecture": (SMALL, {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    "head": (SMALL, {"architectures": ["Qwen3MoeForSequenceClassification"]}, "is not known"),
    "model type": (SMALL, {"architectures": [], "model_type": "mamba"}, "mamba is not known"),
    "no size": (SMALL, {"hidden_size": "removed"}, "has no hidden_size"),
    "bias": (SMALL, {"attention_bias": True}, "attention_bias True"),
    "dense": (SMALL, {"mlp_only_layers": [0]}, "dense layers"),
    "activation": (SMALL, {"hidden_act": "gelu"}, "hidden_act gelu"),
    "rope": (SMALL, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type dynamic"),
    "base": (SMALL, {"rope_theta": 10000.5}, "rope_theta 10000.5"),
    "limit": (GPT_OSS_20B, {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
    "topk": (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method greedy"),
    "query rank": (DEEPSEEK_V3, {"q_lora_rank": None}, "q_lora_rank None"),
    "attention factor": (
        SMALL,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
        "attention_factor 2.0",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_model_that_cannot_be_trained_is_refused(name, folder):
    config, changes, message = UNUSABLE[name]
    with pytest.raises(ValueError, match=r"config.json") as error:
        flags_from_hf(folder(config, **changes))
    assert message in str(error.value)


def test_folders_without_a_usable_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--hf-load .*nowhere: no such folder"):
        flags_from_hf(["--hf-load", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"--hf-load .*: the folder has no config.json"):
        flags_from_hf(["--hf-load", str(tmp_path)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON"):
        flags_from_hf(["--hf-load", str(tmp_path)])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder, tmp_path):
    load = folder(SMALL)
    content = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 95, "content": "<b>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"largest token is 95, and .* vocab_size 95"):
        flags_from_hf(load)
