"""STAND-IN for the adapters of Megatron-Bridge, peft and others, over plain megatron-core.

Of the same structure: what holds the linear, what holds the adapter, and what it is called with.

Letters: M experts of this rank, r rank of an adapter, I and O sizes of a row before and after.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from megatron_llep.experts.adapters import find_base_name
from support.layout import Layout
from support.training import Chunks, Run, build_model
from support.weights import fill_parameters, list_parameters

_OF_ONE_EXPERT = re.compile(r"experts\.\d+\.")


class LoRALinear(nn.Module):
    """As Bridge's: what it is around is `to_wrap`."""

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module):
        super().__init__()
        self.to_wrap, self.adapter = to_wrap, adapter

    def forward(self, hidden, *args):
        output, bias = self.to_wrap(hidden, *args)
        return output + self.adapter(hidden.contiguous(), *args), bias


class SplitLoRALinear(LoRALinear):
    """As canonical LoRA's of a gated linear: an adapter for each half of the output."""

    def forward(self, hidden, *args):
        output, bias = self.to_wrap(hidden, *args)
        halves = (self.adapter.adapter_gate, self.adapter.adapter_up)
        return output + torch.cat([half(hidden, *args) for half in halves], dim=-1), bias


class MagnitudeLinear(LoRALinear):
    """As DoRA's, roughly: a parameter of the adapter scales what both compute."""

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module):
        super().__init__(to_wrap, adapter)
        adapter.weight_magnitude = nn.Parameter(torch.ones(to_wrap.weight.shape[0]))

    def forward(self, hidden, *args):
        output, bias = super().forward(hidden, *args)
        return output * self.adapter.weight_magnitude, bias


class ParallelAdapter(nn.Module):
    """As Bridge's ParallelLinearAdapter, made of Megatron's linears."""

    def __init__(self, base: Any, outputs: int, lora: "Lora"):
        super().__init__()
        self.dim, self.alpha = lora.dim, lora.alpha
        config = base.config
        common = {"config": config, "bias": False, "is_expert": True, "init_method": nn.init.zeros_}
        common["tp_group"] = parallel_state.get_expert_tensor_parallel_group()
        sizes = (base.in_features if hasattr(base, "in_features") else base.input_size, lora.dim)
        is_row = isinstance(base, RowParallelLinear) or getattr(base, "parallel_mode", "") == "row"
        if is_row:
            self.linear_in: nn.Module = RowParallelLinear(
                *sizes, **common, input_is_parallel=True, skip_bias_add=True
            )
        else:
            self.linear_in = ColumnParallelLinear(*sizes, **common, gather_output=True)
        self.linear_out = ColumnParallelLinear(lora.dim, outputs, **common, gather_output=is_row)
        self.dropout = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
        self.activation = nn.Identity()

    def forward(self, hidden, *args):
        inner, _ = self.linear_in(self.dropout(hidden).to(self.linear_in.weight.dtype))
        output, _ = self.linear_out(self.activation(inner))
        return (output * (self.alpha / self.dim)).to(hidden.dtype)


class PackedWeight(nn.Module):
    """[M, out, in]; it is called, so that hooks by which weights are waited for run."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.weight.allreduce = False

    def forward(self):
        return self.weight


class GroupedAdapter(nn.Module):
    """As Bridge's GroupedExpertLinearAdapter: one low-rank pair for each expert of the rank."""

    def __init__(self, base: Any, outputs: int, lora: "Lora"):
        super().__init__()
        self.dim, self.alpha, self.num_local_experts = lora.dim, lora.alpha, base.num_gemms
        self.linear_in = PackedWeight(base.num_gemms, lora.dim, base.in_features)
        self.linear_out = PackedWeight(base.num_gemms, outputs, lora.dim)

    def forward(self, hidden, sizes):
        assert len(sizes) == self.num_local_experts
        weights = zip(self.linear_in(), self.linear_out(), strict=True)
        rows = zip(hidden.split(list(sizes)), weights, strict=True)
        return torch.cat([x @ a.T @ b.T for x, (a, b) in rows]) * (self.alpha / self.dim)


class PeftLinear(nn.Module):
    """As peft's: what it is around is `base_layer`; adapters have names."""

    def __init__(self, base: Any, lora: "Lora"):
        super().__init__()
        self.base_layer, self.scaling = base, {"default": lora.alpha / lora.dim}
        inputs, outputs = base.weight.shape[1], base.weight.shape[0]
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, lora.dim, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(lora.dim, outputs, bias=False)})

    def forward(self, hidden, *args):
        output, bias = self.base_layer(hidden, *args)
        for name, scaling in self.scaling.items():
            output = output + self.lora_B[name](self.lora_A[name](hidden)) * scaling
        return output, bias


def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient hook that Bridge gives adapters which all experts share."""
    gradient = gradient.contiguous()
    dist.all_reduce(gradient, group=parallel_state.get_expert_model_parallel_group())
    return gradient


@dataclass(frozen=True)
class Lora:
    """Which adapters to put around the experts' linears."""

    kind: str = "own"
    """own: one for each expert's linear. split: as canonical LoRA. magnitude: as DoRA. peft: as
    peft's. Around grouped linears: packed, one for each expert in one tensor; shared, one for a
    rank's experts; same, one for all ranks' experts."""
    dim: int = 4
    alpha: int = 8
    dropout: float = 0.0
    targets: tuple[str, ...] = ("linear_fc1", "linear_fc2")
    layers: tuple[int, ...] = (0, 1)
    frozen: bool = True
    """Whether all but the adapters is."""
    dtype: torch.dtype | None = None
    """Of the adapters; default: as the linears."""

    def add(self, chunks: Chunks) -> None:
        """Put them around the experts' linears of built model chunks, with the same values."""
        from megatron.core.transformer.moe.moe_layer import MoELayer

        if self.frozen:
            for chunk in chunks:
                chunk.requires_grad_(False)
        for chunk in chunks:
            for layer in chunk.modules():
                if isinstance(layer, MoELayer) and layer.layer_number - 1 in self.layers:
                    self.add_to(layer.experts)
        fill_adapters(chunks, same=self.kind == "same")

    def add_to(self, experts: nn.Module) -> None:
        """Put them around the linears of a module of experts."""
        owners = list(getattr(experts, "local_experts", [experts]))
        for owner in owners:
            for name in self.targets:
                linear = getattr(owner, name)
                if find_base_name(linear) is None:
                    wrapped = self._wrap(linear, name)
                    setattr(owner, name, wrapped.train(linear.training))

    def build(self, config: Any, run: Run, transform_spec: Callable | None = None) -> Chunks:
        """As `build_model`, with adapters."""
        chunks = build_model(config, run, transform_spec)
        self.add(chunks)
        return chunks

    def _wrap(self, linear: Any, name: str) -> nn.Module:
        if self.kind == "peft":
            wrapper: nn.Module = PeftLinear(linear, self)
            added: list[nn.Module] = [wrapper.lora_A, wrapper.lora_B]
        else:
            adapter_class = GroupedAdapter if self.kind == "packed" else ParallelAdapter
            outputs = linear.out_features if hasattr(linear, "num_gemms") else linear.output_size
            if self.kind == "split" and name == "linear_fc1":
                halves = ("adapter_gate", "adapter_up")
                adapters = {half: adapter_class(linear, outputs // 2, self) for half in halves}
                wrapper = SplitLoRALinear(linear, nn.ModuleDict(adapters))
            elif self.kind == "magnitude":
                wrapper = MagnitudeLinear(linear, adapter_class(linear, outputs, self))
            else:
                wrapper = LoRALinear(linear, adapter_class(linear, outputs, self))
            added = [wrapper.adapter]
        for module in added:
            module.to(self.dtype or next(linear.parameters()).dtype)
            for parameter in module.parameters():
                parameter.requires_grad_()
                if self.kind == "peft":
                    parameter.allreduce = False
                if self.kind == "same":
                    parameter.register_hook(sum_over_ranks)
        return wrapper


def fill_adapters(chunks: Chunks, *, same: bool = False) -> None:
    """Give all adapters their values, by name and, unless they are the same on all ranks, rank."""
    layout = Layout(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        etp=parallel_state.get_expert_tensor_parallel_world_size(),
    )
    added = [
        each
        for each in list_parameters(chunks, layout)
        if {"adapter", "lora_A", "lora_B"} & set(each.name.split("."))
    ]
    fill_parameters(added)
    rank = parallel_state.get_expert_model_parallel_rank()
    for each in added:
        if not same and not _OF_ONE_EXPERT.search(each.name):  # a name of any rank's
            generator = torch.Generator().manual_seed(zlib.crc32(f"{each.name}{rank}".encode()))
            values = torch.randn(each.parameter.shape, generator=generator) * 0.15
            with torch.no_grad():
                each.parameter.copy_(values)
