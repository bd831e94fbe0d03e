"""Norms for machines without Transformer Engine, which know sequence parallelism.

Megatron's local layers normalise with torch's norm wrapped in checks that refuse sequence
parallelism, and so tensor parallelism with experts. The norm here marks its parameters as
sequence parallel, which is all that Megatron needs to sum their gradients over the ranks.

Shape letters: h = hidden size.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_NORMS = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}


def build_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
) -> torch.nn.Module:
    """Torch's norm over the last dimension [.., h], usable under sequence parallelism.

    ``config.persist_layer_norm`` chooses among GPU kernels and has no meaning here.

    Raises:
        ValueError: ``normalization`` is not RMSNorm or LayerNorm, or its weight is stored as
            the difference from one (``layernorm_zero_centered_gamma``).
    """
    if config.normalization not in _NORMS:
        raise ValueError(
            f"--normalization {config.normalization} needs Transformer Engine; "
            f"without it use one of {sorted(_NORMS)}"
        )
    if config.layernorm_zero_centered_gamma:
        raise ValueError(
            "--apply-layernorm-1p needs Transformer Engine; without it leave the flag out"
        )
    norm = _NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
