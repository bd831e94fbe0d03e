"""Multi-latent attention without Transformer Engine: Megatron's own, completed in three places.

1. Under tensor parallelism the down projections are cut, and Megatron gathers what they return.
   The part of the keys that all heads share then gets, on each rank, the gradient of that rank's
   heads only. Cut by sequence it goes the way of Transformer Engine's whole projections, which
   adds up the heads of all ranks.
2. Without a query rank, --qk-layernorm normalises what queries are projected from, in one module
   with the projection, which Megatron has in Transformer Engine alone.
3. In a pack, values are widened for Transformer Engine's kernels, and cut where heads of values are
   wider than those of queries. Here no kernel asks for that.

Letters: s tokens (of a pack: of all its segments), b sequences, h hidden size, n heads of this
rank, t tensor-parallel size, r rank of keys and values, p rotary dimensions.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_llep.compat.latent_attention import resolve_norms
from megatron_llep.compat.refusals import refuse_latent_attention
from megatron_llep.integration.local_norm import build_norm


def check_latent_attention(config: MLATransformerConfig) -> None:
    """Refuse what Megatron's local layers cannot compute; the same on all ranks.

    Raises:
        ValueError: names the flag, its value and the way out.
    """
    refuse_latent_attention()
    if config.qk_l2_norm:
        raise ValueError(
            "--qk-l2-norm: Megatron has no such norm in --multi-latent-attention; use "
            "--qk-layernorm"
        )
    if config.qk_pos_emb_head_dim % 2:
        raise ValueError(
            f"--qk-pos-emb-head-dim {config.qk_pos_emb_head_dim}: rotary embedding turns pairs of "
            "dimensions; give an even number"
        )
    size = config.tensor_model_parallel_size
    keys = config.kv_lora_rank + config.qk_pos_emb_head_dim
    cut = {
        f"--kv-lora-rank {config.kv_lora_rank} and --qk-pos-emb-head-dim "
        f"{config.qk_pos_emb_head_dim}, together {keys},": keys,
        f"--q-lora-rank {config.q_lora_rank}": config.q_lora_rank or 0,
    }
    for what, width in cut.items():
        if width % size:
            raise ValueError(
                f"--tensor-model-parallel-size {size}: without Transformer Engine it cuts the "
                f"down projections of --multi-latent-attention, and {what} cannot be divided by "
                "it; choose another size"
            )


class LocalMLASelfAttention(MLASelfAttention):
    """Megatron's, with gradients right under tensor parallelism, queries' norm, and packs."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        config = self.config
        if config.q_lora_rank is not None or not config.qk_layernorm:
            return resolve_norms(config, submodules)
        # Of queries there are no others.
        return {
            "linear_q_proj": NormedColumnParallelLinear,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def _qkv_down_projection(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project [s / t, b, h] down, keys and values to [s / t, b, r + p]: cut by tokens."""
        queries, keys = super()._qkv_down_projection(hidden_states)
        if self.config.sequence_parallel:
            keys = gather_from_tensor_model_parallel_region(keys)
            keys = scatter_to_sequence_parallel_region(keys)
        return queries, keys

    def _run_core_attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend with values as they are."""
        return self.core_attention(*args, **kwargs)


class NormedColumnParallelLinear(ColumnParallelLinear):
    """A norm and a projection; parameters have the names they have in Transformer Engine."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = build_norm(config, input_size, eps=config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight
        self.layer_norm_bias = getattr(norm, "bias", None)
        self._eps = norm.eps

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `ColumnParallelLinear.forward`, of the normalised input [s / t, b, h]."""
        return super().forward(self._normalise(input_), *args, **kwargs)

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[-1],)
        if self.layer_norm_bias is None:
            return torch.nn.functional.rms_norm(x, shape, self.layer_norm_weight, self._eps)
        return torch.nn.functional.layer_norm(
            x, shape, self.layer_norm_weight, self.layer_norm_bias, self._eps
        )
