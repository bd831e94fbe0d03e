"""Every file in configs/ is understood by Megatron 0.19 and has the published model's shape."""

import argparse
from pathlib import Path

import pytest
import torch
from megatron.training.arguments import (
    add_megatron_arguments,
    core_transformer_config_from_args,
    validate_args,
)

from megatron_llep.integration.arguments import add_llep_arguments, llep_config_from_args
from megatron_llep.integration.hybrid_pattern import refuse_pattern
from megatron_llep.offline.launch.flags import find_script, format_flags, load_config
from megatron_llep.offline.launch.torchrun import layout_world_size
from megatron_llep.training.rl.arguments import add_rl_arguments
from megatron_llep.training.sft.arguments import add_sft_arguments
from megatron_llep.validation import check_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# From config.json of each model on Hugging Face (addresses in the YAML files), under these names.
# moe_ffn is the width of one expert; shared the width of all shared experts together; yarn is
# (factor, original positions).
GPT_OSS_20B = {
    "hidden": 2880,
    "layers": 24,
    "dense_layers": 0,
    "dense_ffn": None,
    "experts": 32,
    "topk": 4,
    "moe_ffn": 2880,
    "shared": 0,
    "heads": 64,
    "kv_heads": 8,
    "head_dim": 64,
    "vocab": 201088,
    "score_function": "softmax",
    "expert_bias": False,
    "topk_scaling": None,
    "groups": (1, 1),
    "mla": None,
    "norm_eps": 1e-5,
    "rope_theta": 150000,
    "yarn": (32.0, 4096),
    "tied": False,
    "linear_bias": True,
    "qk_norm": False,
    "sliding": [True, False] * 12,
    "glu": ("quick_gelu", 1.0, 7.0),
}
DEEPSEEK_V3 = {
    "hidden": 7168,
    "layers": 61,
    "dense_layers": 3,
    "dense_ffn": 18432,
    "experts": 256,
    "topk": 8,
    "moe_ffn": 2048,
    "shared": 2048,
    "heads": 128,
    "kv_heads": 128,
    "head_dim": None,
    "vocab": 129280,
    "score_function": "sigmoid",
    "expert_bias": True,
    "topk_scaling": 2.5,
    "groups": (8, 4),
    "mla": (1536, 512, 128, 64, 128),
    "norm_eps": 1e-6,
    "rope_theta": 10000,
    "yarn": (40.0, 4096),
    "tied": False,
    "linear_bias": False,
    "qk_norm": True,
    "sliding": [False] * 61,
    "glu": ("silu", 0.0, None),
}
PUBLISHED = {
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-120b": GPT_OSS_20B | {"layers": 36, "experts": 128, "sliding": [True, False] * 18},
    "deepseek-v3": DEEPSEEK_V3,
    "kimi-k2": DEEPSEEK_V3
    | {
        "dense_layers": 1,
        "experts": 384,
        "heads": 64,
        "kv_heads": 64,
        "vocab": 163840,
        "topk_scaling": 2.827,
        "groups": (1, 1),
        "rope_theta": 50000,
        "yarn": (32.0, 4096),
    },
    "qwen3-30b-a3b": {
        "hidden": 2048,
        "layers": 48,
        "dense_layers": 0,
        "dense_ffn": None,
        "experts": 128,
        "topk": 8,
        "moe_ffn": 768,
        "shared": 0,
        "heads": 32,
        "kv_heads": 4,
        "head_dim": 128,
        "vocab": 151936,
        "score_function": "softmax",
        "expert_bias": False,
        "topk_scaling": None,
        "groups": (1, 1),
        "mla": None,
        "norm_eps": 1e-6,
        "rope_theta": 1000000,
        "yarn": None,
        "tied": False,
        "linear_bias": False,
        "qk_norm": True,
        "sliding": [False] * 48,
        "glu": ("silu", 0.0, None),
    },
}
ON_CPUS = (
    "tiny",
    "tiny-hybrid",
    "tiny-latent",
    "tiny-deepseek",
    "demo",
    "sft-demo",
    "rl-demo",
    "two-nodes",
)
RECIPES = {"sft-gpt-oss-20b": "gpt-oss-20b", "sft-qwen3-30b-a3b": "qwen3-30b-a3b"}
"""Fine-tuning on 8 GPUs, of a published model."""
HYBRID = ("nemotron-3-super",)
"""Whose layers follow a pattern."""
PARAMETERS_IN_BILLIONS = {
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "deepseek-v3": 671,
    "kimi-k2": 1026,
    "qwen3-30b-a3b": 30.5,
}


def parse_flags(flags):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for add in (add_megatron_arguments, add_llep_arguments, add_sft_arguments, add_rl_arguments):
        parser = add(parser)
    return parser.parse_args(format_flags(flags))


def flags_of(path):
    merged = {}
    for flags in load_config(path).values():
        merged |= flags
    return merged


def build_transformer_config(path):
    """Megatron's own checks and its transformer config, as a run of the layout's size has them."""
    flags = flags_of(path) | {"--no-rope-fusion": True}  # fused only with Transformer Engine
    args = parse_flags(flags)
    args.rank = 0
    args.world_size = layout_world_size(flags)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Of the GPUs that these models need; that of a CPU is 0.0.
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        validate_args(args)
    return args, core_transformer_config_from_args(args)


def shape_of(args, config):
    layers = range(config.num_layers)
    frequency = args.moe_layer_freq
    is_moe = frequency if isinstance(frequency, list) else [i % frequency == 0 for i in layers]
    dense = list(is_moe).count(0)
    assert not any(is_moe[:dense])
    mla = None
    if args.multi_latent_attention:
        mla = (
            config.q_lora_rank,
            config.kv_lora_rank,
            config.qk_head_dim,
            config.qk_pos_emb_head_dim,
            config.v_head_dim,
        )
    yarn = None
    if args.multi_latent_attention and config.rope_type == "yarn":
        yarn = (config.rotary_scaling_factor, config.original_max_position_embeddings)
    elif args.position_embedding_type == "yarn":
        yarn = (
            config.yarn_rotary_scaling_factor,
            config.yarn_original_max_position_embeddings,
        )
    window = args.window_size
    sliding = [bool(window) and (i + 1) % config.window_attn_skip_freq != 0 for i in layers]
    if window:
        assert sum(window) + 1 == 128, "tokens a sliding-window layer sees"
    return {
        "hidden": config.hidden_size,
        "layers": config.num_layers,
        "dense_layers": dense,
        "dense_ffn": config.ffn_hidden_size if dense else None,
        "experts": config.num_moe_experts,
        "topk": config.moe_router_topk,
        "moe_ffn": config.moe_ffn_hidden_size,
        "shared": config.moe_shared_expert_intermediate_size or 0,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_query_groups,
        "head_dim": None if mla else config.kv_channels,
        "vocab": args.padded_vocab_size,
        "score_function": config.moe_router_score_function,
        "expert_bias": config.moe_router_enable_expert_bias,
        "topk_scaling": config.moe_router_topk_scaling_factor,
        "groups": (config.moe_router_num_groups or 1, config.moe_router_group_topk or 1),
        "mla": mla,
        "norm_eps": config.layernorm_epsilon,
        "rope_theta": args.rotary_base,
        "yarn": yarn,
        "tied": not args.untie_embeddings_and_output_weights,
        "linear_bias": config.add_bias_linear,
        "qk_norm": config.qk_layernorm,
        "sliding": sliding,
        "glu": (
            config.activation_func.__name__,
            config.glu_linear_offset,
            config.activation_func_clamp_value,
        ),
    }


def count_parameters(shape):
    """Weights in billions, biases and norms left out."""
    hidden = shape["hidden"]
    if shape["mla"]:
        q_rank, kv_rank, nope, rope, value = shape["mla"]
        attention = hidden * (q_rank + kv_rank + rope)
        attention += shape["heads"] * (q_rank * (nope + rope) + kv_rank * (nope + value))
        attention += shape["heads"] * value * hidden
    else:
        attention = 2 * hidden * shape["head_dim"] * (shape["heads"] + shape["kv_heads"])
    expert_layer = 3 * hidden * (shape["experts"] * shape["moe_ffn"] + shape["shared"])
    moe_layers = shape["layers"] - shape["dense_layers"]
    total = shape["layers"] * attention + moe_layers * (expert_layer + hidden * shape["experts"])
    total += shape["dense_layers"] * 3 * hidden * (shape["dense_ffn"] or 0)
    return (total + 2 * shape["vocab"] * hidden) / 1e9


def test_every_published_model_is_there():
    assert {path.stem for path in CONFIGS} == {*ON_CPUS, *PUBLISHED, *RECIPES, *HYBRID}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_is_the_published_one(name):
    args, config = build_transformer_config(ROOT / "configs" / f"{name}.yaml")
    assert shape_of(args, config) == PUBLISHED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_fine_tuning_keeps_the_shape_on_8_gpus(name):
    path = ROOT / "configs" / f"{name}.yaml"
    args, config = build_transformer_config(path)
    assert shape_of(args, config) == PUBLISHED[RECIPES[name]]
    assert args.world_size == 8
    assert args.calculate_per_token_loss
    assert args.use_distributed_optimizer
    assert args.bf16
    assert find_script(path) == "finetune/sft_gpt.py"


@pytest.mark.parametrize("name", [*HYBRID, "tiny-hybrid", "tiny-latent"])
def test_a_hybrid_model_has_the_layers_of_its_pattern(name):
    path = ROOT / "configs" / f"{name}.yaml"
    args, config = build_transformer_config(path)
    assert config.num_layers == len(args.hybrid_layer_pattern)
    assert find_script(path) == "pretrain/pretrain_hybrid.py"
    assert not list(refuse_pattern(args))


def test_nemotron_3_super_has_the_published_shape():
    """Of config.json; its number of parameters: tests/offline/simulator/test_simulate.py."""
    args, config = build_transformer_config(ROOT / "configs" / "nemotron-3-super.yaml")
    pattern = args.hybrid_layer_pattern
    assert [pattern.count(symbol) for symbol in "ME*"] == [40, 40, 8]
    assert (config.hidden_size, config.moe_latent_size) == (4096, 1024)
    assert (config.num_moe_experts, config.moe_router_topk) == (512, 22)
    assert config.moe_router_topk_scaling_factor == 5.0
    assert (config.moe_ffn_hidden_size, config.moe_shared_expert_intermediate_size) == (2688, 5376)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (32, 2, 128)
    assert (config.mamba_num_heads, config.mamba_head_dim, config.mamba_num_groups) == (128, 64, 8)
    assert (args.padded_vocab_size, config.layernorm_epsilon) == (131072, 1e-5)
    assert args.position_embedding_type == "none"


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_has_the_published_number_of_parameters(name):
    assert count_parameters(PUBLISHED[name]) == pytest.approx(
        PARAMETERS_IN_BILLIONS[name], rel=0.01
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_llep_accepts_the_configuration(path):
    args, config = build_transformer_config(path)
    llep = llep_config_from_args(args)
    assert llep.enabled
    check_config(config, llep)
    assert args.moe_grouped_gemm == (path.stem not in ON_CPUS)
    assert not args.moe_aux_loss_coeff
    assert args.moe_router_load_balancing_type == "none"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_sections_hold_the_flags_they_name(path):
    sections = load_config(path)
    assert all(flag.startswith("--moe-llep") for flag in sections["LLEP_ARGS"])
    assert sections["LLEP_ARGS"]["--moe-llep"] is True
    assert all("-parallel-" in flag for flag in sections["LAYOUT_ARGS"])
    assert not any(
        flag.startswith("--moe-llep") or "-parallel-size" in flag for flag in sections["MODEL_ARGS"]
    )


def test_an_unknown_flag_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        parse_flags(flags_of(ROOT / "configs" / "tiny.yaml") | {"--no-such-flag": 1})
    assert "--no-such-flag" in capsys.readouterr().err
