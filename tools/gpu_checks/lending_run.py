"""A small GPT model of Megatron's with experts: losses and gradients of a few micro-batches.

Letters: T tokens of a rank, E experts, K experts per token, b sequences, s tokens of each.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from gpu_checks.comparison import Outcome
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.integration.local_spec import build_local_block_spec
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.offline.workloads import route_tokens

_VOCABULARY = 64
_LOWERED_BY = 30.0


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Of the model and its micro-batches."""

    hidden: int = 256
    ffn_hidden: int = 512
    num_experts: int = 16
    top_k: int = 2
    layers: int = 2
    sequence_length: int = 256
    micro_batch_size: int = 2
    micro_batches: int = 2


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Whose layers."""

    dtype: torch.dtype
    transformer_engine: bool = False
    """Transformer Engine's layers and grouped experts, instead of Megatron's local ones."""
    grouped_mm: bool = False
    """LLEP computes the local experts in torch's grouped GEMMs; plain Megatron never does."""

    def __str__(self) -> str:
        layers = "Transformer Engine" if self.transformer_engine else "local layers"
        gemms = " with grouped_mm" if self.grouped_mm else ""
        return f"{layers}{gemms}, {str(self.dtype).removeprefix('torch.')}"


def run_model(
    size: ModelSize, kind: Kind, workload: str, llep: LLEPConfig | None, device: torch.device
) -> Outcome:
    """Forward and backward of some micro-batches, gradients reduced as in training.

    The weights are the same on every call, and the same numbers in every dtype. All ranks of the
    expert-parallel group call it.
    """
    ep, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = _build_model(size, kind, ep).to(device, kind.dtype)
    _fill(model, rank)
    plans: list[int] = []
    if llep is not None:
        convert_model([model], llep)
        _count_transfers(model, plans)
    experts = route_tokens(
        workload,
        num_ranks=ep,
        num_experts=size.num_experts,
        tokens_per_rank=size.sequence_length * size.micro_batch_size,
        top_k=size.top_k,
        rank=rank,
    )
    _force_routing(model, torch.from_numpy(experts).to(device), size.num_experts)
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
    )
    wrapped.zero_grad_buffer()
    losses = [
        _run_micro_batch(wrapped, size, rank, number, device)
        for number in range(size.micro_batches)
    ]
    _reduce_gradients(wrapped)
    gradients = {
        name: parameter.main_grad.detach().float().cpu()
        for name, parameter in model.named_parameters()
    }
    return Outcome(losses=losses, gradients=gradients, lent=sum(plans))


def _build_model(size: ModelSize, kind: Kind, ep: int) -> GPTModel:
    config = TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=4,
        ffn_hidden_size=size.ffn_hidden,
        num_moe_experts=size.num_experts,
        moe_ffn_hidden_size=size.ffn_hidden,
        moe_router_topk=size.top_k,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=kind.transformer_engine,
        expert_model_parallel_size=ep,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=kind.dtype,
        bf16=kind.dtype == torch.bfloat16,
        transformer_impl="transformer_engine" if kind.transformer_engine else "local",
        # Of Megatron's own output layer this would need apex; Transformer Engine's: see below.
        gradient_accumulation_fusion=False,
    )
    if kind.transformer_engine:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    else:
        spec = build_local_block_spec(config)
    model = GPTModel(
        config,
        spec,
        vocab_size=_VOCABULARY,
        max_sequence_length=size.sequence_length,
        position_embedding_type="rope",
    )
    linears: list[Any] = [m for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    for linear in linears:  # Transformer Engine's
        linear.fuse_wgrad_accumulation = True
    return model


def _fill(model: torch.nn.Module, rank: int) -> None:
    """Fill with numbers that bf16 holds exactly; experts of every rank with others."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            of_rank = rank if ".experts." in name else 0
            generator = torch.Generator().manual_seed(10_000 * of_rank + index)
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            if parameter.dim() == 1:  # norms
                values += 1
            parameter.copy_(values.bfloat16())


def _force_routing(model: torch.nn.Module, experts: torch.Tensor, num_experts: int) -> None:
    """Let tokens choose experts [T, K]: the logits of all others are lowered."""
    lowered = torch.full((len(experts), num_experts), _LOWERED_BY, device=experts.device)
    lowered.scatter_(1, experts, 0.0)
    for router in _find(model, TopKRouter):
        router.gating = functools.partial(_gate, router.gating, lowered)


def _gate(gating: Callable, lowered: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [s, b, E]; `lowered` is [s * b, E]."""
    logits = gating(hidden)
    return logits - lowered.view_as(logits).to(logits.dtype)


def _find(model: torch.nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _count_transfers(model: torch.nn.Module, plans: list[int]) -> None:
    for layer in _find(model, LLEPMoELayer):
        layer.token_dispatcher.on_plan.append(
            lambda planned: plans.append(len(planned.plan.transfers))
        )


def _reduce_gradients(wrapped: DistributedDataParallel) -> None:
    """Reduce as Megatron does; over gloo bucket by bucket.

    Megatron puts buckets together in one coalesced all-reduce, which gloo has for CPUs only.
    """
    if dist.get_backend() != "gloo":
        finalize_model_grads([wrapped])
        return
    for group in wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups:
        for bucket in group.buckets:
            bucket.grad_data.mul_(bucket.gradient_scaling_factor)
            dist.all_reduce(bucket.grad_data, group=group.data_parallel_group)


def _run_micro_batch(
    model: torch.nn.Module, size: ModelSize, rank: int, number: int, device: torch.device
) -> float:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    shape = (size.micro_batch_size, size.sequence_length + 1)
    tokens = torch.randint(_VOCABULARY, shape, generator=generator).to(device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(size.sequence_length, device=device).expand_as(inputs)
    with model.no_sync() if number + 1 < size.micro_batches else contextlib.nullcontext():
        loss = model(inputs, positions, None, labels=labels).mean()
        loss.backward()
    return loss.item()
