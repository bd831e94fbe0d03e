"""What planner auto knows about a layer of Megatron's: its shape, and the machine it runs on."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.cost_model import LayerCost, LayerShape
from megatron_llep.cost_presets import get_cost_model


def get_layer_cost(config: TransformerConfig, llep: LLEPConfig) -> LayerCost | None:
    """The cost of a model's MoE layers, as one rank holds them; None without a cost model.

    Raises:
        ValueError: the cost model cannot be read.
    """
    if llep.cost_model is None:
        return None
    weights = config.params_dtype
    gradients = weights if llep.grad_dtype == "param" else torch.promote_types(weights, torch.float)
    refetch = llep.foreign_weights == "refetch" or (
        llep.foreign_weights is None and config.pipeline_model_parallel_size > 1
    )
    shape = LayerShape(
        hidden=config.hidden_size,
        ffn_hidden=config.moe_ffn_hidden_size // config.expert_tensor_parallel_size,
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        gated=config.gated_linear_unit,
        bytes_per_element=weights.itemsize,
        bytes_per_gradient=gradients.itemsize,
        refetch=refetch,
        scatter_from=llep.scatter_from,
    )
    return LayerCost(model=get_cost_model(llep.cost_model), shape=shape)
