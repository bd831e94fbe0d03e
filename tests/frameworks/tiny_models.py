"""A tiny Qwen3-MoE for Bridge, verl and ms-swift, and the layers that it has on a CPU."""

from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_llep.integration.local_spec import build_local_block_spec

VOCABULARY = 320


def local_layers(config: Any, vp_stage: int | None = None) -> Any:
    """This project's, in the place of Transformer Engine's."""
    return build_local_block_spec(config, vp_stage)


LAYERS: dict[str, Any] = {
    "transformer_layer_spec": local_layers,
    "transformer_impl": "local",
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_dropout_fusion": False,
}
"""What a model of Bridge's has to change where Transformer Engine is not."""

FLOAT32: dict[str, Any] = {
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "bf16": False,
}


def make_folder(folder: Path) -> Path:
    """Random weights in bf16, config.json, and no tokenizer."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Of bytes, with the special tokens of Qwen's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(letters + special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
    ).save_pretrained(folder)
