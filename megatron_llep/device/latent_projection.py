"""Latent experts (`--moe-latent-size`) without Transformer Engine.

Megatron projects tokens into the latent size and back with a linear layer of Transformer Engine,
which no specification names.

Letters: I input size, O output size.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.transformer_config import TransformerConfig


class DuplicatedLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank has all of, as `TELinear` "duplicated"."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], object],
        bias: bool,
        **_: Any,
    ):
        super().__init__()
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, **options))
        self.bias = torch.nn.Parameter(torch.zeros(output_size, **options)) if bias else None
        if config.perform_initialization:
            # Its state is the same on all tensor-parallel ranks.
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)
        for parameter in self.parameters():
            parameter.allreduce = True
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[.., I] -> [.., O], and no bias that is left to add."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias), None


def prepare_latent_projections() -> None:
    """Give Megatron's MoE layer a linear to project with where Transformer Engine is missing.

    A second call does nothing.
    """
    if not transformer_engine.HAVE_TE:
        moe_layer.HAVE_TE, moe_layer.TELinear = True, DuplicatedLinear
