"""Layers for machines without Transformer Engine: Megatron's own, with some parts replaced.

Megatron's local norm refuses sequence parallelism, its local attention packed sequences and heads
of values with a width of their own; ours take them. Multi-latent attention is completed.
"""

from dataclasses import replace
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.integration.local_attention import PackedDotProductAttention
from megatron_llep.integration.local_latent_attention import (
    LocalMLASelfAttention,
    check_latent_attention,
)
from megatron_llep.integration.local_norm import build_norm


def build_local_block_spec(
    config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's layers: Megatron's local ones, with ours for some parts.

    Dense layers (``moe_layer_freq``), shared experts and the norms of queries and keys are as
    Megatron's own builder makes them.

    Raises:
        ValueError: as :func:`check_latent_attention`; and, when the model is built, as
            :func:`build_norm`.
    """
    if config.multi_latent_attention:
        check_latent_attention(config)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    layers = [_replace_modules(layer) for layer in block.layer_specs]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=build_norm)


def build_local_mtp_spec(
    config: TransformerConfig, block: TransformerBlockSubmodules, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Spec of the multi-token-prediction layers of this stage, or None where there are none.

    They repeat the last layer of ``block``, or, where that is empty, of the model, as Megatron's
    own builder does.
    """
    if not config.mtp_num_layers:
        return None
    if not block.layer_specs:
        layers = get_gpt_decoder_layer_specs(
            config,
            use_transformer_engine=False,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
        )
        block = TransformerBlockSubmodules(layer_specs=[_replace_modules(layers[-1])])
    return get_gpt_mtp_block_spec_for_backend(config, block, _LocalBackend(), vp_stage=vp_stage)


class _LocalBackend(LocalSpecProvider):
    """Megatron's provider of local modules, with :func:`build_norm`."""

    def layer_norm(self, *args: Any, **kwargs: Any) -> Any:
        return build_norm


_REPLACED: dict[type, Any] = {
    WrappedTorchNorm: build_norm,
    DotProductAttention: PackedDotProductAttention,
    MLASelfAttention: LocalMLASelfAttention,
}


def _replace_modules(spec: ModuleSpec) -> ModuleSpec:
    """Copy a layer's spec with ours in the place of the modules that are replaced."""
    changes: dict[str, Any] = {}
    for name, value in vars(spec.submodules).items():
        if isinstance(value, type) and value in _REPLACED:
            changes[name] = _REPLACED[value]
        elif isinstance(value, ModuleSpec) and value.submodules is not None:
            changes[name] = _replace_modules(value)
    module = spec.module
    if isinstance(module, type):
        module = _REPLACED.get(module, module)
    return replace(spec, module=module, submodules=replace(spec.submodules, **changes))
