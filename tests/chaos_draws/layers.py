"""A draw's MoE layers under Megatron's DDP, on one rank: the same weights and inputs each time.

Letters: T tokens of this rank, H hidden size, E experts, K experts per token.
"""

import contextlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from chaos_draws.draw import MOST_TOKENS, Draw

# Logits are within +-2, and those of experts that a token must not choose are lowered below that:
# the choice is never a near tie, and the probabilities are no near certainties.
_LARGEST_LOGIT, _LOWERED_BY = 2.0, 5.0

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What one rank computed in all steps."""

    outputs: Tensors
    """And gradients of inputs, by step and micro-batch."""
    gradients: Tensors
    """After the reduction over data parallelism, whole, by step and parameter."""
    expert_names: frozenset[str]
    """Of these those of experts, which are reduced over expert data parallelism."""


class MoEStack(torch.nn.Module):
    """MoE layers one after another, each added to what goes by."""

    def __init__(self, draw: Draw, config: TransformerConfig):
        super().__init__()
        build = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
        self.config = config
        self.layers = torch.nn.ModuleList(
            build(config=config, pg_collection=None) for _ in range(config.num_layers)
        )
        for number, layer in enumerate(self.layers, start=1):
            layer.set_layer_number(number)
        self.choices: list[torch.Tensor] = []
        """[MOST_TOKENS, K] of each layer: what the tokens of this step choose, by position, so that
        a forward that is recomputed chooses the same."""
        for index, layer in enumerate(self.layers):
            layer.router.gating = partial(self._gate, layer.router.gating, index)
        _fill(self, draw)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, 1, H] to the same."""
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return hidden

    def _gate(
        self,
        gating: Callable[[torch.Tensor], torch.Tensor],
        index: int,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [T, 1, E]."""
        T = len(hidden)
        if T == 0:  # which Megatron's gating cannot reshape; its hooks fire in the order of others
            hidden = torch.cat([hidden, hidden.new_zeros(1, *hidden.shape[1:])])
        logits = gating(hidden)[:T]
        logits = _LARGEST_LOGIT * torch.tanh(logits)
        lowered = torch.full_like(logits[:, 0], _LOWERED_BY)
        lowered.scatter_(1, self.choices[index][:T], 0.0)
        return logits - lowered[:, None]


def run(draw: Draw, convert: Callable[[MoEStack], object], *, exact: bool = False) -> Ran:
    """Build the draw's layers and run all of its steps.

    Args:
        draw: the same on all ranks.
        convert: called with the layers before DDP wraps them.
        exact: compute in fp32 what the draw has in bf16.
    """
    dtype = torch.float32 if exact else getattr(torch, draw.dtype)
    stack = MoEStack(draw, make_config(draw, dtype))
    convert(stack)
    wrapped = DistributedDataParallel(
        stack.config, DistributedDataParallelConfig(**draw.ddp), stack
    )
    outputs: Tensors = {}
    gradients: Tensors = {}
    for step in range(draw.steps):
        wrapped.zero_grad_buffer()
        stack.choices = [choose(draw, step, layer) for layer in range(len(stack.layers))]
        outputs |= _run_step(draw, step, wrapped, dtype)
        _gather_shards(wrapped)
        gradients |= {
            f"step {step}, gradient of {name}": parameter.main_grad.detach().clone()
            for name, parameter in stack.named_parameters()
        }
    experts = frozenset(name for name in gradients if ".experts." in name)
    return Ran(outputs=outputs, gradients=gradients, expert_names=experts)


def make_config(draw: Draw, dtype: torch.dtype) -> TransformerConfig:
    """Of the layers, with nothing that is fused."""
    layout = draw.layout
    return TransformerConfig(
        num_attention_heads=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **draw.model,
    )


def choose(draw: Draw, step: int, layer: int) -> torch.Tensor:
    """Experts [MOST_TOKENS, K] of this rank's tokens, all different in a row."""
    E, K = draw.model["num_moe_experts"], draw.model["moe_router_topk"]
    popularity = torch.arange(1, E + 1, dtype=torch.float64) ** -draw.skew
    of_rank = () if draw.same_skew else (dist.get_rank(),)
    order = torch.randperm(E, generator=_seed(draw, "experts", step, layer, *of_rank))
    generator = _seed(draw, "tokens", step, layer, dist.get_rank())
    return torch.multinomial(popularity[order].expand(MOST_TOKENS, E), K, generator=generator)


def _run_step(
    draw: Draw, step: int, wrapped: DistributedDataParallel, dtype: torch.dtype
) -> Tensors:
    """Run a step's micro-batches, and reduce gradients in or after the last."""
    found: Tensors = {}
    last = len(draw.tokens[step]) - 1
    in_flight: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def go_back(micro_batch: int, hidden: torch.Tensor, output: torch.Tensor) -> None:
        generator = _seed(draw, "output", step, micro_batch, dist.get_rank())
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
        with contextlib.nullcontext() if micro_batch == last else wrapped.no_sync():
            output.backward(grad)
        found[f"step {step}, input gradient {micro_batch}"] = hidden.grad

    for micro_batch, tokens in enumerate(draw.tokens[step]):
        generator = _seed(draw, "input", step, micro_batch, dist.get_rank())
        shape = (tokens[dist.get_rank()], 1, draw.model["hidden_size"])
        hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
        hidden = hidden.bfloat16() if draw.dtype == "bfloat16" else hidden
        hidden = hidden.to(dtype).requires_grad_()
        with contextlib.nullcontext() if micro_batch == last else wrapped.no_sync():
            output = wrapped(hidden)
        found[f"step {step}, output {micro_batch}"] = output.detach()
        in_flight.append((micro_batch, hidden, output))
        if not draw.in_flight:
            go_back(*in_flight.pop())
    for each in in_flight:
        go_back(*each)
    wrapped.finish_grad_sync()
    return found


def _fill(stack: MoEStack, draw: Draw) -> None:
    """Give every parameter its values: other ones on ranks that hold other experts, or parts."""
    part = (
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )
    for name, parameter in stack.named_parameters():
        generator = _seed(draw, name, *(part if ".experts." in name else ()))
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        if draw.dtype == "bfloat16":
            values = values.bfloat16()
        parameter.data.copy_(values)


def _gather_shards(wrapped: DistributedDataParallel) -> None:
    """Complete main_grad where the distributed optimizer has reduced only this rank's shard."""
    if not wrapped.ddp_config.use_distributed_optimizer:
        return
    for group in wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


def _seed(draw: Draw, *of: Any) -> torch.Generator:
    text = f"{draw.seed} {draw.number} {of}"
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))
