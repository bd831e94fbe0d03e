"""Which norms multi-latent attention has, which Megatron decides in one place from 0.19 on."""

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_llep.compat import MEGATRON

if MEGATRON >= (0, 19):
    from megatron.core.transformer.multi_latent_attention import QKNormConfigResolver


def resolve_norms(
    config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules
) -> dict[str, Any]:
    """What Megatron builds of projections and norms, by name."""
    return QKNormConfigResolver(config, submodules).resolve()
