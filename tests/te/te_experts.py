"""Models whose experts are Transformer Engine's; the rest of them is Megatron's local layers."""

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TERowParallelGroupedLinear,
)
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

LINEARS = GroupedMLPSubmodules(
    linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
)

# What a Run needs beside `spec=use_te_experts`.
TE_CONFIG = {"moe_grouped_gemm": True, "use_cpu_initialization": True}


def use_te_experts(block: Any) -> Any:
    """Copy a block's spec with TEGroupedMLP in every MoE layer."""
    block = copy.copy(block)
    block.layer_specs = [_replace_experts(layer) for layer in block.layer_specs]
    return block


def _replace_experts(layer: Any) -> Any:
    mlp = layer.submodules.mlp
    assert mlp.func is MoELayer
    submodules = copy.copy(mlp.keywords["submodules"])
    submodules.experts = partial(TEGroupedMLP, submodules=LINEARS)
    layer = copy.copy(layer)
    layer.submodules = copy.copy(layer.submodules)
    layer.submodules.mlp = partial(MoELayer, **(mlp.keywords | {"submodules": submodules}))
    return layer


def make_experts(num_experts: int, config: TransformerConfig, device: str = "cpu") -> TEGroupedMLP:
    """A module of experts by itself, with random weights; main_grad is zero."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with get_fp8_context(config, is_init=True):  # of --fp8-param-gather
        experts = TEGroupedMLP(num_experts, config, LINEARS, groups).to(device)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if config.gradient_accumulation_fusion:
            parameter.main_grad = torch.zeros(parameter.shape, device=parameter.device)
    return experts
