"""Pairs of Megatron's `SequentialMLP` and its grouped form, with the same weights.

Letters: G experts, n rows of all of them, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.experts.grouped_mm import GroupedMM
from support.comparison import get_relative_difference

H, F, G = 16, 24, 5

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}


def build_experts(dtype: torch.dtype = torch.float32, **settings: Any) -> SequentialMLP:
    """G experts of random weights, biases included; SwiGLU without biases unless told otherwise."""
    num_experts = settings.pop("num_experts", G)
    config = TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": H,
            "num_attention_heads": 2,
            "num_moe_experts": 2 * num_experts,
            "expert_model_parallel_size": 2,  # its other rank is not there
            "moe_ffn_hidden_size": F,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "bias_activation_fusion": False,
            "gradient_accumulation_fusion": False,
            "add_bias_linear": False,
            "params_dtype": dtype,
            **settings,
        }
    )
    experts = SequentialMLP(
        num_experts,
        config,
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ProcessGroupCollection.use_mpu_process_groups(),
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return experts


def build_both(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[SequentialMLP, ...]:
    """The same experts as Megatron's module and as a GroupedMM."""
    plain = build_experts(dtype, **settings)
    grouped = build_experts(dtype, **settings)
    GroupedMM.convert(grouped)
    return plain, grouped


def run(experts: SequentialMLP, sizes: Sequence[int]) -> dict[str, torch.Tensor | None]:
    """Forward and backward on random rows: the output and all gradients."""
    weight = next(experts.parameters())
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    hidden = draw(sum(sizes), H).requires_grad_()
    probs = draw(sum(sizes)).sigmoid().float().to(hidden.device).requires_grad_()
    output, bias = experts(hidden, torch.tensor(sizes), probs)
    assert bias is None
    output.backward(draw(*output.shape))
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": output.detach(), "hidden": hidden.grad, "probs": probs.grad, **grads}


def assert_same(plain: SequentialMLP, grouped: SequentialMLP, sizes: Sequence[int]) -> None:
    """Both modules give the same output and gradients on the same rows."""
    for experts in (plain, grouped):
        experts.zero_grad(set_to_none=True)
    expected, found = run(plain, sizes), run(grouped, sizes)
    tolerance = TOLERANCE[next(plain.parameters()).dtype]
    for name, value in expected.items():
        actual = found[name]
        assert (actual is None) == (value is None), name
        if value is None or not value.numel():
            continue
        assert actual is not None
        assert actual.dtype == value.dtype, name
        difference = get_relative_difference(actual.double(), value.double())
        assert difference <= tolerance, f"{name} differs by {difference:.1e} with {sizes}"
