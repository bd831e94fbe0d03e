"""One real MoE layer of Megatron's, built the same on every call, and routed as a workload says.

Letters: T tokens of a rank, E experts, K experts per token, h hidden size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model

_LOWERED_BY = 30.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the layer and its input; K is 1, so that a workload's shares are shares of the pairs."""

    num_ranks: int = 2
    hidden: int = 512
    ffn_hidden: int = 1024
    num_experts: int = 32
    tokens_per_rank: int = 4096
    dtype: torch.dtype = torch.float32


class BenchLayer:
    """A layer with its input and gradients, ready to run forward and backward."""

    def __init__(self, sizes: Sizes, rank: int, llep: LLEPConfig | None):
        self.module = build_layer(sizes, rank)
        if llep is not None:
            convert_model([self.module], llep)
        generator = torch.Generator().manual_seed(2000 + rank)
        shape = (sizes.tokens_per_rank, 1, sizes.hidden)
        self._hidden = torch.randn(shape, generator=generator).requires_grad_()
        self._grad = torch.randn(shape, generator=generator)
        self._lowered = torch.zeros(sizes.tokens_per_rank, sizes.num_experts)
        router = self.module.router
        router.gating = functools.partial(self._gate, router.gating)
        for parameter in self.module.parameters():
            # As with Megatron's DDP: gradients have a place, and micro-batches add to it.
            parameter.grad = torch.zeros_like(parameter)

    def route(self, experts: torch.Tensor) -> None:
        """Let tokens choose experts [T, K] from now on."""
        self._lowered.fill_(_LOWERED_BY).scatter_(1, experts, 0.0)

    def run(self) -> torch.Tensor:
        """Forward and backward; returns the output [T, 1, h]."""
        output = self.run_forward()
        self.run_backward(output)
        return output.detach()

    def run_forward(self) -> torch.Tensor:
        """The output [T, 1, h], to go backward from."""
        return self.module(self._hidden)[0]

    def run_backward(self, output: torch.Tensor) -> None:
        """From the output of `run_forward`."""
        output.backward(self._grad)
        self._hidden.grad = None

    def share_experts(self, other: "BenchLayer") -> None:
        """Compute with the very experts of another layer from now on."""
        self.module.experts = other.module.experts

    def get_routing_map(self) -> torch.Tensor:
        """Where tokens go, bool [T, E]."""
        with torch.no_grad():
            return self.module.router(self._hidden)[1]

    def _gate(self, gating: Callable, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, 1, E]: those of experts that a token must not choose are lowered."""
        return gating(hidden) - self._lowered[:, None, :]


def build_layer(sizes: Sizes, rank: int, *, transformer_engine: bool = False) -> MoELayer:
    """Megatron's layer with a rank's weights, in Transformer Engine's grouped experts or its own.

    Its activations are not fused: nothing has to be compiled.
    """
    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        num_attention_heads=8,
        num_moe_experts=sizes.num_experts,
        moe_ffn_hidden_size=sizes.ffn_hidden,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=sizes.num_ranks,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        add_bias_linear=False,
        params_dtype=sizes.dtype,
        bf16=sizes.dtype == torch.bfloat16,
        moe_grouped_gemm=transformer_engine,
    )
    build = get_moe_module_spec(
        use_te=transformer_engine,
        num_experts=sizes.num_experts,
        moe_grouped_gemm=transformer_engine,
    )
    layer = build(config=config, pg_collection=None)
    layer.set_layer_number(1)
    for seed, module in ((1000 + rank, layer.experts), (1, layer.router)):
        parameters = list(module.parameters())
        generator = torch.Generator(parameters[0].device).manual_seed(seed)
        for parameter in parameters:
            torch.nn.init.normal_(parameter.data, std=0.02, generator=generator)
    return layer
