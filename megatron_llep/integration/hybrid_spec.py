"""Hybrid stacks for machines without Transformer Engine, of which Megatron's own spec is made.

Megatron builds a `HybridModel` from one specification of each kind of layer; the pattern says which
comes where. Here each is made of Megatron's local modules, with this project's norm and attention:
`*` and `+` attention, `-` dense, `E` experts; and `M` (Mamba) and `G` (gated delta net), whose
kernels are packages of their own.
"""

import copy
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_llep.integration.local_spec import build_local_block_spec, build_norm


class LocalHybridStack(HybridStack):
    """Megatron's stack, whose last norm is this project's and not Transformer Engine's."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        post_layer_norm: bool = True,
        post_process: bool = True,
        **kwargs: Any,
    ):
        super().__init__(config, *args, post_layer_norm=False, post_process=post_process, **kwargs)
        self.post_layer_norm = post_layer_norm
        if post_layer_norm and post_process:
            self.final_norm: torch.nn.Module = build_norm(
                config, config.hidden_size, config.layernorm_epsilon
            )


def build_local_hybrid_spec(config: TransformerConfig) -> ModuleSpec:
    """Spec of a hybrid stack, for any pattern of the layers above.

    Args:
        config: of the model. Of its two kinds of attention one is there: `+` under
            `multi_latent_attention`, else `*`. `E` needs `num_moe_experts`.

    Raises:
        ValueError: as `build_local_block_spec`.
    """
    dense = _pick_submodules(config, has_experts=False)
    attention = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=dense.input_layernorm,
            self_attention=dense.self_attention,
            self_attn_bda=dense.self_attn_bda,
            sharded_state_dict_keys_map=dense.sharded_state_dict_keys_map,
        ),
    )
    layers = {
        "mla_layer" if config.multi_latent_attention else "attention_layer": attention,
        "mlp_layer": ModuleSpec(module=MLPLayer, submodules=_keep_mlp(dense)),
        "mamba_layer": _build_mamba_spec(),
        "gdn_layer": _build_gdn_spec(),
    }
    if config.num_moe_experts:
        experts = _pick_submodules(config, has_experts=True)
        layers["moe_layer"] = ModuleSpec(module=MoETransformerLayer, submodules=_keep_mlp(experts))
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(**layers, mtp_block_spec=_build_mtp_spec()),
    )


def _pick_submodules(config: TransformerConfig, *, has_experts: bool) -> TransformerLayerSubmodules:
    """The modules of one layer of a GPT model of this configuration."""
    one_layer = copy.copy(config)
    one_layer.num_layers = 1
    one_layer.moe_layer_freq = [int(has_experts)]
    one_layer.pipeline_model_parallel_size = 1
    one_layer.virtual_pipeline_model_parallel_size = None
    one_layer.pipeline_model_parallel_layout = None
    one_layer.num_layers_in_first_pipeline_stage = None
    one_layer.num_layers_in_last_pipeline_stage = None
    return build_local_block_spec(one_layer, pp_rank=0).layer_specs[0].submodules


def _keep_mlp(layer: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """Of a layer its dense part, or its experts, alone."""
    return TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm,
        mlp=layer.mlp,
        mlp_bda=layer.mlp_bda,
        sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
    )


def _build_mamba_spec() -> ModuleSpec:
    mixer = ModuleSpec(
        module=MambaMixer,
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=build_norm,
            mixer=mixer,
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )


def _build_gdn_spec() -> ModuleSpec:
    attention = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=build_norm, out_proj=RowParallelLinear
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=build_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.in_proj.layer_norm_"},
        ),
    )


def _build_mtp_spec() -> ModuleSpec:
    """Norms and projection of a multi-token-prediction depth; the pattern says what is within."""
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=build_norm,
            hnorm=build_norm,
            eh_proj=ColumnParallelLinear,
            mtp_model_layer=None,
            layer_norm=build_norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )
