"""What the cost model knows about a layer of Megatron's: its shape, and the machine it runs on."""

from typing import TYPE_CHECKING

from megatron_llep.planner.cost.model import LayerCost, LayerShape
from megatron_llep.planner.cost.presets import get_cost_model

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_llep.config import LLEPConfig


_FP8_BYTES = {"tensorwise": 1, "blockwise": 1, "mxfp8": 2}
"""Of a quantised parameter that is lent, by recipe: rows, in `mxfp8` columns as well. Scales, which
are 1/32 of that at most, are left out."""


def get_layer_cost(config: "TransformerConfig", llep: "LLEPConfig") -> LayerCost | None:
    """The cost of a model's MoE layers, as one rank holds them; None without a cost model.

    Raises:
        ValueError: the cost model cannot be read.
    """
    if llep.cost_model is None:
        return None
    return LayerCost(model=get_cost_model(llep.cost_model), shape=get_layer_shape(config, llep))


def get_layer_shape(config: "TransformerConfig", llep: "LLEPConfig") -> LayerShape:
    """A model's MoE layers, as one rank holds them."""
    weight_bytes = config.params_dtype.itemsize
    gradient_bytes = weight_bytes if llep.grad_dtype == "param" else max(4, weight_bytes)
    refetch = llep.foreign_weights == "refetch" or (
        llep.foreign_weights is None and config.pipeline_model_parallel_size > 1
    )
    return LayerShape(
        hidden=config.moe_latent_size or config.hidden_size,
        ffn_hidden=config.moe_ffn_hidden_size // config.expert_tensor_parallel_size,
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        gated=config.gated_linear_unit,
        bytes_per_element=weight_bytes,
        bytes_per_weight=_FP8_BYTES.get(config.fp8_recipe) if config.fp8_param else None,
        bytes_per_gradient=gradient_bytes,
        refetch=refetch,
        scatter_from=llep.scatter_from,
    )
