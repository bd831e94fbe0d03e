"""Tiny random Hugging Face folders, made by transformers, and their logits there.

Letters: B sequences of S tokens, V vocabulary.
"""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("transformers", "safetensors", "megatron.bridge"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: make setup", allow_module_level=True)

import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

VOCABULARY = 96
SEQUENCE = 24

# Widths that are no multiples of each other, but for EP 4 and TP 2.
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
QWEN3_MOE = _SMALL | {
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "num_experts": 8,
    "norm_topk_prob": True,
    "rope_theta": 100000.0,
}
GPT_OSS = _SMALL | {
    "num_hidden_layers": 4,
    "intermediate_size": 16,  # twice that is hidden_size: the matrices' shapes tell nothing
    "num_local_experts": 8,
    "sliding_window": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}

DEEPSEEK_V3 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "num_nextn_predict_layers": 1,
}


def make_deepseek_v3(
    folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 1, **changes: Any
) -> Path:
    """A DeepSeek-V3 folder, whose experts have biases, with a layer of multi-token prediction."""
    config = transformers.DeepseekV3Config(**(DEEPSEEK_V3 | changes))
    model = transformers.DeepseekV3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed + 1000)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    _save(model, folder, dtype, seed)
    _add_prediction_layer(folder, config, generator)
    return folder


def _add_prediction_layer(folder: Path, config: Any, generator: torch.Generator) -> None:
    """As the last layer, with what is its own, and the copies that published folders have."""
    weights = read_weights(folder)
    last, new = (f"model.layers.{config.num_hidden_layers + i}." for i in (-1, 0))
    layer = {
        name.replace(last, new): weight * 0.9
        for name, weight in weights.items()
        if name.startswith(last)
    }
    width = config.hidden_size
    for name in ("enorm", "hnorm", "shared_head.norm"):
        layer[f"{new}{name}.weight"] = 0.5 + 0.1 * torch.randn(width, generator=generator)
    layer[f"{new}eh_proj.weight"] = 0.1 * torch.randn(width, 2 * width, generator=generator)
    layer[f"{new}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    layer[f"{new}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    dtype = weights["lm_head.weight"].dtype
    write_weights(
        folder,
        [("model.safetensors", weights | {name: each.to(dtype) for name, each in layer.items()})],
    )


def make_qwen3_moe(
    folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 1, **changes: Any
) -> Path:
    """A Qwen3-MoE folder."""
    config = transformers.Qwen3MoeConfig(**(QWEN3_MOE | changes))
    return _save(transformers.Qwen3MoeForCausalLM(config), folder, dtype, seed)


def make_gpt_oss(
    folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 1, **changes: Any
) -> Path:
    """A gpt-oss folder."""
    config = transformers.GptOssConfig(**(GPT_OSS | changes))
    return _save(transformers.GptOssForCausalLM(config), folder, dtype, seed)


def _save(model: Any, folder: Path, dtype: torch.dtype, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale, mean = (0.1, 0.0) if parameter.dim() > 1 else (0.1, 0.5)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(mean + scale * noise)
    model.to(dtype).save_pretrained(folder)
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of all files of a folder, as they are on disk."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights


def write_weights(folder: Path, files: Iterable[tuple[str, dict[str, torch.Tensor]]]) -> None:
    """Replace a folder's weights by these files, with an index if there are several."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    files = list(files)
    for name, weights in files:
        save_file(weights, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {tensor: name for name, weights in files for tensor in weights}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_in_shards(folder: Path, number: int = 3) -> None:
    """Several files and an index, as large models have them."""
    weights = read_weights(folder)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(number)]
    for i, (name, tensor) in enumerate(sorted(weights.items())):
        parts[i % number][name] = tensor
    names = [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]
    write_weights(folder, zip(names, parts, strict=True))


def fuse_experts(folder: Path) -> None:
    """Hold a layer's experts in one tensor, as transformers 5 does in memory."""
    weights = read_weights(folder)
    experts = {name for name in weights if ".mlp.experts." in name}
    fused = {name: tensor for name, tensor in weights.items() if name not in experts}
    prefixes = {name.split(".experts.")[0] for name in experts}
    count = len(experts) // len(prefixes) // 3
    for prefix in prefixes:
        gates, ups, downs = (
            [weights[f"{prefix}.experts.{i}.{part}_proj.weight"] for i in range(count)]
            for part in ("gate", "up", "down")
        )
        both = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        fused[f"{prefix}.experts.gate_up_proj"] = torch.stack(both)
        fused[f"{prefix}.experts.down_proj"] = torch.stack(downs)
    write_weights(folder, [("model.safetensors", fused)])


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def make_tokens(row: int) -> torch.Tensor:
    """[1, S]; a data-parallel rank's."""
    generator = torch.Generator().manual_seed(row)
    return torch.randint(VOCABULARY, (1, SEQUENCE), generator=generator)


def read_logits(folder: Path, rows: int) -> torch.Tensor:
    """Logits [B, S, V] of rows of `make_tokens`, by transformers in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.cat([make_tokens(row) for row in range(rows)])
    with torch.no_grad():
        return model(tokens).logits
