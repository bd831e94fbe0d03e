"""Shapes of models, as far as the time of a step goes.

The built-in ones are those that the LLEP paper measures; their files in configs/ name the sources.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llep.offline.simulator.layers import (
    count_attention_weights,
    count_gdn_weights,
    count_layers,
    count_mamba_weights,
)
from megatron_llep.planner.cost.model import LayerShape

if TYPE_CHECKING:
    from megatron_llep.offline.recording import Recording


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model with mixture-of-experts layers."""

    name: str
    moe_layers: int
    layer: LayerShape
    other_flops_per_token: float
    """Forward, of all layers: attention, dense layers, shared experts, router, output."""
    tokens_per_rank: int = 4096
    """Of one micro-batch, where nothing else is asked for."""


def make_model(name: str, args: dict[str, Any], tokens_per_rank: int) -> ModelShape:
    """Read a model's shape from Megatron's flags (without dashes in front).

    Raises:
        KeyError: one is missing.
        ValueError: as `count_layers`.
    """
    hidden, E = args["hidden-size"], args["num-experts"]
    layers = count_layers(args)
    latent = args.get("moe-latent-size") or 0  # there tokens travel, and experts compute
    moe_layers, attention_layers = layers["moe"], layers["attention"]
    matrices = 3 if args.get("swiglu") or args.get("quick-geglu") else 2
    weights = (
        attention_layers * count_attention_weights(args)
        + layers["mamba"] * count_mamba_weights(args)
        + layers["gdn"] * count_gdn_weights(args)
        + layers["dense"] * matrices * hidden * args["ffn-hidden-size"]
        + moe_layers * matrices * hidden * args.get("moe-shared-expert-intermediate-size", 0)
        + moe_layers * hidden * E
        + moe_layers * 2 * hidden * latent
        + hidden * args.get("padded-vocab-size", 0)  # where the tokenizer says it: left out
    )
    heads = args["num-attention-heads"]
    if args.get("multi-latent-attention"):
        width = heads * (args["qk-head-dim"] + args["qk-pos-emb-head-dim"] + args["v-head-dim"])
    else:
        width = 2 * heads * args["kv-channels"]
    scores = 2 * attention_layers * width * _keys_per_token(args)
    return ModelShape(
        name=name,
        moe_layers=moe_layers,
        layer=LayerShape(
            hidden=latent or hidden,
            ffn_hidden=args.get("moe-ffn-hidden-size") or args["ffn-hidden-size"],
            num_experts=E,
            top_k=args["moe-router-topk"],
            gated=matrices == 3,
        ),
        other_flops_per_token=2 * weights + scores,
        tokens_per_rank=tokens_per_rank,
    )


def _keys_per_token(args: dict[str, Any]) -> float:
    """Keys that a token attends to, averaged over tokens and layers."""
    causal = args["seq-length"] / 2
    if "window-size" not in args:
        return causal
    window = int(str(args["window-size"]).strip("()[]").split(",")[0]) + 1
    every = args["window-attn-skip-freq"]  # every so many layers one has no window
    return causal / every + min(window, causal) * (every - 1) / every


_GPT_OSS_120B = {
    "num-layers": 36,
    "hidden-size": 2880,
    "ffn-hidden-size": 2880,
    "num-attention-heads": 64,
    "num-query-groups": 8,
    "kv-channels": 64,
    "window-size": "127,0",
    "window-attn-skip-freq": 2,
    "seq-length": 4096,
    "quick-geglu": True,
    "padded-vocab-size": 201088,
    "num-experts": 128,
    "moe-router-topk": 4,
    "moe-ffn-hidden-size": 2880,
}
_DEEPSEEK_V3 = {
    "num-layers": 61,
    "hidden-size": 7168,
    "ffn-hidden-size": 18432,
    "num-attention-heads": 128,
    "multi-latent-attention": True,
    "q-lora-rank": 1536,
    "kv-lora-rank": 512,
    "qk-head-dim": 128,
    "qk-pos-emb-head-dim": 64,
    "v-head-dim": 128,
    "seq-length": 4096,
    "swiglu": True,
    "padded-vocab-size": 129280,
    "num-experts": 256,
    "moe-layer-freq": "([0]*3+[1]*58)",
    "moe-router-topk": 8,
    "moe-ffn-hidden-size": 2048,
    "moe-shared-expert-intermediate-size": 2048,
}
_KIMI_K2 = _DEEPSEEK_V3 | {
    "num-attention-heads": 64,
    "padded-vocab-size": 163840,
    "num-experts": 384,
    "moe-layer-freq": "([0]*1+[1]*60)",
}

# Tokens a rank: what the LLEP paper measures with.
MODELS: dict[str, ModelShape] = {
    "gpt-oss-120b": make_model("gpt-oss-120b", _GPT_OSS_120B, 32768),
    "deepseek-v3": make_model("deepseek-v3", _DEEPSEEK_V3, 16384),
    "kimi-k2": make_model("kimi-k2", _KIMI_K2, 16384),
}


def model_of_recording(recording: "Recording") -> ModelShape:
    """What a recording knows of its model: the layers, and of the rest as much as the run knew.

    Raises:
        ValueError: it does not know the layers; names the way out.
    """
    info = recording.info
    layer = info.shape
    if layer is None:
        raise ValueError(f"{recording.folder} does not say how large its layers are: give --model")
    return ModelShape(
        name=recording.folder.resolve().name,
        moe_layers=len(recording.layers),
        layer=layer,
        other_flops_per_token=info.model.get("other_flops_per_token", 0.0),
    )


def get_model(name_or_path: str) -> ModelShape:
    """A built-in model by its name, or one from a YAML file as in configs/.

    Raises:
        ValueError: neither, or the file lacks a flag; says which.
        ImportError: a file was given and PyYAML is missing.
    """
    if name_or_path in MODELS:
        return MODELS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"model {name_or_path!r} is unknown: choose one of {', '.join(MODELS)}, or give a file "
            "with MODEL_ARGS as in configs/"
        )
    try:
        from megatron_llep.offline.launch.flags import load_config
    except ImportError as error:
        raise ImportError(
            "a model's file needs PyYAML: pip install 'megatron-llep[train]'"
        ) from error
    flags = load_config(path)["MODEL_ARGS"]
    args: dict[str, Any] = {flag.removeprefix("--"): value for flag, value in flags.items()}
    try:
        return make_model(path.stem, args, args["seq-length"] * args.get("micro-batch-size", 1))
    except KeyError as error:
        raise ValueError(f"model {path}: {error} is missing") from error
