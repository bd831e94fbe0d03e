"""The Megatron flags that say what the `config.json` of a Hugging Face model says.

One function an architecture; `shape_of` chooses among them. Pure: no torch, no transformers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_llep.training.hf.config_file import HFConfig
from megatron_llep.training.hf.rope import Rope, read_rope

Value = bool | int | float | str
"""Of a flag; True for one that takes none. A flag that must not be given is left out."""


@dataclass(frozen=True)
class Shape:
    """What a model's configuration asks of Megatron's command line.

    Attributes:
        flags: must be so, or the weights do not fit or mean something else.
        defaults: taken where the user says nothing else.
        vocab_size: rows of the embedding.
    """

    flags: dict[str, Value]
    vocab_size: int
    defaults: dict[str, Value] = field(default_factory=dict)


def shape_of(config: HFConfig) -> Shape:
    """Translate a configuration.

    Raises:
        ValueError: an architecture that is not known here, a value that Megatron cannot train,
            or one that is missing; names the file.
    """
    architecture = _architecture(config)
    if architecture not in _TRANSLATE:
        raise ValueError(
            f"{config.path}: architecture {architecture} is not known here; those that are: "
            f"{', '.join(sorted(_TRANSLATE))}"
        )
    shape = _TRANSLATE[architecture](config)
    if config.get("tie_word_embeddings", default=False):
        del shape.flags["--untie-embeddings-and-output-weights"]
    return shape


def _architecture(config: HFConfig) -> str:
    """The first of `architectures`, or that of the model type where the list is missing."""
    architectures = config.get("architectures", default=[])
    if architectures:
        return str(architectures[0])
    return _OF_MODEL_TYPE.get(config.model_type, config.model_type)


def _qwen3_moe(config: HFConfig) -> Shape:
    for name in ("attention_bias", "use_sliding_window"):
        if config.get(name, default=False):
            raise config.refuse(name, True, "no Qwen3-MoE model that is supported here has it")
    every, dense = config.get("decoder_sparse_step", default=1), config.get("mlp_only_layers")
    if every != 1 or dense:
        raise config.refuse(
            "(decoder_sparse_step, mlp_only_layers)",
            (every, dense),
            "megatron-bridge knows no Qwen3-MoE model with dense layers",
        )
    is_moe = [True] * config.require("num_hidden_layers")
    flags = _common(config) | _attention(config) | _experts(config, "num_experts", is_moe)
    flags |= {"--qk-layernorm": True, "--swiglu": True, "--disable-bias-linear": True}
    if not config.get("norm_topk_prob", default=False):
        flags["--moe-router-pre-softmax"] = True
    return _shape(config, flags, is_moe)


def _gpt_oss(config: HFConfig) -> Shape:
    limit = config.get("swiglu_limit", default=7.0)
    if limit != 7.0:
        raise config.refuse("swiglu_limit", limit, "transformers computes this model with 7.0")
    if not config.get("attention_bias", default=True):
        raise config.refuse("attention_bias", False, "gpt-oss has biases in every linear layer")
    layers = config.require("num_hidden_layers")
    is_moe = [True] * layers
    flags = _common(config) | _attention(config) | _experts(config, "num_local_experts", is_moe)
    flags |= {
        "--moe-ffn-hidden-size": config.require("intermediate_size"),
        "--quick-geglu": True,
        "--glu-linear-offset": 1.0,
        "--activation-func-clamp-value": limit,
        "--softmax-type": "learnable",
    }
    flags |= _sliding(config, layers)
    shape = _shape(config, flags, is_moe)
    shape.defaults["--no-bias-dropout-fusion"] = True
    return shape


def _deepseek_v3(config: HFConfig) -> Shape:
    if not config.get("norm_topk_prob", default=True):
        raise config.refuse("norm_topk_prob", False, "Megatron's sigmoid router always normalises")
    if config.get("attention_bias", default=False):
        raise config.refuse("attention_bias", True, "Megatron's latent attention has no biases")
    method = config.get("topk_method", default="noaux_tc")
    if method != "noaux_tc":
        raise config.refuse("topk_method", method, "Megatron's expert bias is noaux_tc")
    layers = config.require("num_hidden_layers")
    is_moe = [i >= config.get("first_k_dense_replace", default=0) for i in range(layers)]
    flags = _common(config) | _experts(config, "n_routed_experts", is_moe)
    flags |= _latent_attention(config)
    flags |= {
        "--swiglu": True,
        "--disable-bias-linear": True,
        "--moe-router-score-function": config.get("scoring_func", default="sigmoid"),
        "--moe-router-topk-scaling-factor": config.get("routed_scaling_factor", default=1.0),
        "--moe-router-enable-expert-bias": True,
    }
    shared = config.get("n_shared_experts", default=0)
    if shared:
        width = shared * config.require("moe_intermediate_size")
        flags["--moe-shared-expert-intermediate-size"] = width
    if config.get("n_group", default=1) > 1:
        flags["--moe-router-num-groups"] = config.require("n_group")
        flags["--moe-router-group-topk"] = config.require("topk_group")
    shape = _shape(config, flags, is_moe)
    shape.defaults["--kv-channels"] = config.require("v_head_dim")  # of no meaning here
    return shape


_TRANSLATE: dict[str, Callable[[HFConfig], Shape]] = {
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "GptOssForCausalLM": _gpt_oss,
    "DeepseekV3ForCausalLM": _deepseek_v3,
}
_OF_MODEL_TYPE = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def _shape(config: HFConfig, flags: dict[str, Value], is_moe: list[bool]) -> Shape:
    defaults: dict[str, Value] = {
        "--max-position-embeddings": config.require("max_position_embeddings"),
        "--attention-dropout": config.get("attention_dropout", default=0.0),
        "--hidden-dropout": 0.0,
    }
    if all(is_moe):  # no layer has this width
        defaults["--ffn-hidden-size"] = flags.pop("--ffn-hidden-size")
    if flags["--position-embedding-type"] == "yarn":
        defaults["--no-rope-fusion"] = True
    return Shape(flags, config.require("vocab_size"), defaults)


def _common(config: HFConfig) -> dict[str, Value]:
    activation = config.get("hidden_act", default="silu")
    if activation != "silu":
        raise config.refuse("hidden_act", activation, "only silu is known for this architecture")
    return {
        "--num-layers": config.require("num_hidden_layers"),
        "--hidden-size": config.require("hidden_size"),
        "--ffn-hidden-size": config.require("intermediate_size"),
        "--num-attention-heads": config.require("num_attention_heads"),
        "--normalization": "RMSNorm",
        "--norm-epsilon": config.require("rms_norm_eps"),
        "--untie-embeddings-and-output-weights": True,
    }


def _attention(config: HFConfig) -> dict[str, Value]:
    heads = config.require("num_attention_heads")
    groups = config.get("num_key_value_heads", default=heads)
    width = config.get("head_dim", default=config.require("hidden_size") // heads)
    flags: dict[str, Value] = {
        "--kv-channels": width,
        "--group-query-attention": True,
        "--num-query-groups": groups,
    }
    return flags | _rotary(config, read_rope(config))


def _rotary(config: HFConfig, rope: Rope) -> dict[str, Value]:
    flags: dict[str, Value] = {"--rotary-base": rope.base}
    if not rope.yarn:
        return flags | {"--position-embedding-type": "rope"}
    yarn = rope.yarn
    flags |= {
        "--position-embedding-type": "yarn",
        "--rotary-scaling-factor": yarn.factor,
        "--yarn-original-max-position-embeddings": yarn.original_positions,
        "--yarn-beta-fast": yarn.beta_fast,
        "--yarn-beta-slow": yarn.beta_slow,
        "--mscale": yarn.mscale,
        "--mscale-all-dim": yarn.mscale_all_dim,
    }
    if not yarn.truncate:
        flags["--no-yarn-correction-range-round-to-int"] = True
    return flags


def _latent_attention(config: HFConfig) -> dict[str, Value]:
    if config.get("q_lora_rank") is None:
        raise config.refuse(
            "q_lora_rank",
            None,
            "with --qk-layernorm Megatron then normalises what queries are made of once more",
        )
    flags: dict[str, Value] = {
        "--multi-latent-attention": True,
        "--q-lora-rank": config.require("q_lora_rank"),
        "--qk-layernorm": True,
        "--kv-lora-rank": config.require("kv_lora_rank"),
        "--qk-head-dim": config.require("qk_nope_head_dim"),
        "--qk-pos-emb-head-dim": config.require("qk_rope_head_dim"),
        "--v-head-dim": config.require("v_head_dim"),
        "--position-embedding-type": "rope",
    }
    rope = read_rope(config)
    flags |= {"--rotary-base": rope.base, "--rope-type": "yarn" if rope.yarn else "rope"}
    if rope.yarn:
        given = (rope.yarn.original_positions, rope.yarn.beta_fast, rope.yarn.beta_slow)
        if given != (4096, 32.0, 1.0):
            raise config.refuse(
                "YaRN's (original_max_position_embeddings, beta_fast, beta_slow)",
                given,
                "Megatron has no flags for them under latent attention and takes (4096, 32, 1)",
            )
        flags |= {
            "--rotary-scaling-factor": rope.yarn.factor,
            "--mscale": rope.yarn.mscale,
            "--mscale-all-dim": rope.yarn.mscale_all_dim,
        }
    return flags


def _experts(config: HFConfig, number: str, is_moe: list[bool]) -> dict[str, Value]:
    if not any(is_moe):
        raise config.refuse("num_hidden_layers", len(is_moe), "no layer has experts")
    flags: dict[str, Value] = {
        # transformers 5 writes num_local_experts for all of them.
        "--num-experts": config.require(number, "num_local_experts"),
        "--moe-router-topk": config.require("num_experts_per_tok", "experts_per_token"),
        "--moe-router-score-function": "softmax",
    }
    if config.get("moe_intermediate_size") is not None:
        flags["--moe-ffn-hidden-size"] = config.require("moe_intermediate_size")
    if not all(is_moe):
        flags["--moe-layer-freq"] = _per_layer(is_moe)
    return flags


def _sliding(config: HFConfig, layers: int) -> dict[str, Value]:
    """Windows: Megatron counts the tokens before the own one, transformers the own one too."""
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    is_sliding = [kind == "sliding_attention" for kind in kinds]
    if not any(is_sliding):
        return {}
    flags: dict[str, Value] = {"--window-size": f"{config.require('sliding_window') - 1},0"}
    if not all(is_sliding):
        flags["--window-attn-skip-freq"] = _per_layer(is_sliding)
    return flags


def _per_layer(values: list[bool]) -> str:
    return "[" + ",".join(str(int(value)) for value in values) + "]"


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding in Megatron: as few more as tensor parallelism needs."""
    return math.ceil(vocab_size / tensor_parallel_size) * tensor_parallel_size
