"""STAND-IN, NOT TRANSFORMER ENGINE: torch on the CPU in place of its CUDA kernels.

TE's own Python code runs: modules, autograd functions, quantiser lists, weight caches. Replaced are
only what calls into CUDA, and Megatron's optimizer kernels from TE. What passes here can still fail
in the real kernels.

FP8 runs with TE's reference quantiser for tensorwise scaling, made able to stay in TE's cache of
weights, and a GEMM over the dequantised values.
"""

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_float8tensor
from te_quantised import read_numbers

Gemm = tuple[str, int]
"""Layout (TN forward, NN gradient of the input, NT gradient of the weights), number of experts."""


def install(monkeypatch: pytest.MonkeyPatch) -> list[Gemm]:
    """Put the stand-ins in place for one test; the list gets every grouped GEMM that runs."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex
    from transformer_engine.pytorch import quantization, utils
    from transformer_engine.pytorch.module import base, grouped_linear

    gemms: list[Gemm] = []

    def note_and_compute(A, B, out, *args, layout="TN", **kwargs):
        gemms.append((layout, len(A)))
        return grouped_gemm(A, B, out, *args, layout=layout, **kwargs)

    monkeypatch.setattr(grouped_linear, "general_grouped_gemm", note_and_compute)
    monkeypatch.setattr(grouped_linear, "get_dummy_wgrad", make_dummy_gradient)
    monkeypatch.setattr(utils, "_empty_tensor", lambda: torch.empty(0))
    monkeypatch.setattr(tex, "fused_multi_row_padding", copy_rows)
    monkeypatch.setattr(tex, "fused_multi_row_unpadding", copy_rows)
    # As for the tensorwise recipe that the custom one stands for.
    monkeypatch.setattr(base, "is_stateless_recipe", lambda recipe: True)
    monkeypatch.setattr(quantization, "check_fp8_support", lambda: (True, ""))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _admit_the_cpu(monkeypatch, base.TransformerEngineBaseModule)
    _use_torch_kernels(monkeypatch)
    from megatron.core import fp8_utils

    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: make_fp8_recipe())
    assert te.GroupedLinear.prepare_forward is base.TransformerEngineBaseModule.prepare_forward
    return gemms


@torch.no_grad()  # delayed weight gradients are computed outside of autograd
def grouped_gemm(
    A: list[Any],
    B: list[Any],
    out: list[torch.Tensor],
    quantization_params: list[Any],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    grad: bool = False,
    accumulate: bool = False,
    bias: list[torch.Tensor] | None = None,
    use_bias: bool | None = False,
    use_split_accumulator: bool = False,
    single_output: bool = False,
) -> tuple[Any, list[Any], None]:
    """out[i] = B[i] A[i], either transposed as the layout says, with bias or its gradient."""
    assert len(A) == len(B)
    A = [_dequantise(a, rowwise=layout[0] == "T") for a in A]
    B = [_dequantise(b, rowwise=layout[1] == "N") for b in B]
    outputs = out[0].split(m_splits) if single_output else out
    grad_bias: list[Any] = [torch.empty(0)] * len(A)
    for i, (a, b, output) in enumerate(zip(A, B, outputs, strict=True)):
        a = a.T if layout[0] == "T" else a
        b = b.T if layout[1] == "T" else b
        result = b @ a
        if use_bias and not grad:
            result = result + bias[i].to(result.dtype)
        if use_bias and grad:
            grad_bias[i] = b.sum(dim=1).to(out[0].dtype)  # b is transposed: [features, tokens]
        output.copy_(output + result if accumulate else result)
    return out[0] if single_output else out, grad_bias, None


def _dequantise(tensor: Any, *, rowwise: bool) -> torch.Tensor:
    """In at least fp32, in which the kernels add up."""
    if is_float8tensor(tensor):  # a parameter
        return read_numbers(tensor, rowwise=rowwise)
    if isinstance(tensor, torch.Tensor):
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if rowwise:
        assert tensor.data is not None, "not quantised for this direction"
        return tensor.data.float() * tensor.scale
    assert tensor.data_t is not None, "not quantised for this direction"
    return (tensor.data_t.float() * tensor.scale_t).T


def make_dummy_gradient(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """NaN where TE leaves memory as it is: who reads it shall notice."""
    return torch.zeros(shape, dtype=dtype) if zero else torch.full(shape, torch.nan, dtype=dtype)


def copy_rows(
    source: torch.Tensor, target: torch.Tensor, rows: list[int], target_rows: list[int]
) -> None:
    """Copy blocks of rows into blocks of another size, zero where there is more room."""
    assert sum(rows) == len(source)
    assert sum(target_rows) == len(target)
    target.zero_()
    for a, b in zip(source.split(rows), target.split(target_rows), strict=True):
        kept = min(len(a), len(b))
        b[:kept] = a[:kept]


@functools.cache  # TE makes quantisers anew for another recipe
def make_fp8_recipe(fixed_scale: float | None = None) -> Any:
    """Tensorwise scaling, rows aligned as for TE's own recipe.

    Args:
        fixed_scale: for all tensors, instead of one from a tensor's largest value. A slot's values
            are then quantised alike whichever other tokens are in it.
    """
    from transformer_engine.common.recipe import CustomRecipe
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import (
        CurrentScalingQuantizerRef,
        CurrentScalingTensorRef,
    )

    class Kept(CurrentScalingTensorRef):
        """Keeps its data when autograd saves it, so that it may be cached, and can be renewed."""

        def prepare_for_saving(self):
            return CurrentScalingTensorRef.prepare_for_saving(copy.copy(self))

        def quantize_(self, tensor, noop_flag=None):
            self._quantizer.update_quantized(tensor, self, noop_flag=noop_flag)

    class Quantizer(CurrentScalingQuantizerRef):
        def quantize(self, tensor, **kwargs):
            return Kept(**vars(super().quantize(tensor, **kwargs)))

        @classmethod
        def compute_scale(cls, x, *args, **kwargs):
            scale, inverse, amax = super().compute_scale(x, *args, **kwargs)
            if fixed_scale is not None:
                scale, inverse = scale.new_tensor(fixed_scale), scale.new_tensor(1 / fixed_scale)
            return scale, inverse, amax

    def make_quantizer(role: Any) -> Quantizer:
        backward = role is not None and role.tensor_type == "grad_output"
        return Quantizer(torch.float8_e5m2 if backward else torch.float8_e4m3fn)

    return CustomRecipe(qfactory=make_quantizer, quantization_alignment=16)


def _admit_the_cpu(monkeypatch: pytest.MonkeyPatch, module_class: type) -> None:
    """TE's modules ask for CUDA where they are made, and where they are given a tensor."""
    init, prepare_forward = module_class.__init__, module_class.prepare_forward

    class SaysItIsOnTheGpu(torch.Tensor):
        is_cuda = True

    def init_on_cpu(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            init(self, *args, **kwargs)

    def prepare_on_cpu(self, inp, *args, **kwargs):
        prepared = prepare_forward(self, inp.as_subclass(SaysItIsOnTheGpu), *args, **kwargs)
        return prepared.as_subclass(torch.Tensor)

    monkeypatch.setattr(module_class, "__init__", init_on_cpu)
    monkeypatch.setattr(module_class, "prepare_forward", prepare_on_cpu)


def _use_torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's optimizers and router as without TE, and apex's kernel of its own linears."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as mixed_precision
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setattr(moe_utils, "te_general_gemm", None)  # the router's
    monkeypatch.setattr(optimizer, "Adam", torch.optim.AdamW)
    monkeypatch.setattr(optimizer, "SGD", torch.optim.SGD)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", True)
    for module in (clip_grads, mixed_precision):
        monkeypatch.setattr(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
        monkeypatch.setattr(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_tensor_impl", None)

    def add_weight_gradient(inputs, grad, main_grad):
        main_grad.add_(grad.t().matmul(inputs))

    kernels = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernels, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
