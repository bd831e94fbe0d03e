"""STAND-IN, NOT TRANSFORMER ENGINE: quantised parameters on the CPU.

The tensor classes are TE's own. In place of its kernels: quantisers, written down from what TE
documents, the transpose, and the way back to numbers, by rows and by columns apart.
"""

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import pad
from transformer_engine.pytorch import DType
from transformer_engine.pytorch import tensor as te

Recipe = Literal["tensorwise", "blockwise", "mxfp8"]
RECIPES: tuple[Recipe, ...] = ("tensorwise", "blockwise", "mxfp8")

LARGEST = 448.0
BLOCK, MX_BLOCK = 128, 32
_E4M3 = DType.kFloat8E4M3


def install_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in place for one test; the GPU is one that wants transposes (Hopper)."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor import float8_tensor
    from transformer_engine.pytorch.tensor.storage import float8_tensor_storage

    def transpose(data, dtype, out=None):
        result = data.T.contiguous()
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(tex, "fp8_transpose", transpose)
    for module in (float8_tensor, float8_tensor_storage):
        monkeypatch.setattr(module, "is_non_tn_fp8_gemm_supported", lambda: False)
    monkeypatch.setattr(
        te.MXFP8Tensor,
        "dequantize",
        lambda self, *, dtype=None: read_numbers(self).to(dtype or self.dtype),
    )

    def make_update(recipe: Recipe) -> Any:
        def update(self, src, dst, *, noop_flag=None):
            dst.copy_from_storage(quantise(src.reshape(dst.shape), recipe))
            if recipe == "blockwise" and dst._columnwise_data is not None:
                dst._create_columnwise()
            if recipe == "tensorwise" and dst._transpose is not None:
                dst._create_transpose()
            return dst

        return update

    monkeypatch.setattr(
        te.Float8CurrentScalingQuantizer, "update_quantized", make_update("tensorwise")
    )
    monkeypatch.setattr(te.Float8BlockQuantizer, "update_quantized", make_update("blockwise"))
    monkeypatch.setattr(te.MXFP8Quantizer, "update_quantized", make_update("mxfp8"))


def quantise_from_shards(params, shards, starts, group) -> None:
    """STAND-IN for Megatron's `quantize_param_shard`, and TE's casts in it: before the all-gather.

    TE writes this rank's shard of the data, and all scales; here all is written.
    """
    for param, shard, start in zip(params, shards, starts, strict=True):
        whole = torch.zeros(param.numel())
        if shard is not None:
            whole[start : start + shard.numel()] = shard
        dist.all_reduce(whole, group=group)
        param._quantizer.update_quantized(whole.view(param.shape).to(param.dtype), param)


def quantise(matrix: torch.Tensor, recipe: Recipe) -> Any:
    """As TE does weights under a recipe; the tensor shows the matrix's dtype."""
    make = {"tensorwise": _by_tensor, "blockwise": _by_blocks, "mxfp8": _by_rows_and_columns}
    return make[recipe](matrix.detach().float(), matrix.dtype)


def _by_tensor(matrix: torch.Tensor, dtype: torch.dtype) -> te.Float8Tensor:
    scale = LARGEST / matrix.abs().amax()
    return te.Float8Tensor(
        shape=matrix.shape,
        dtype=dtype,
        data=(matrix * scale).to(torch.float8_e4m3fn).view(torch.uint8),
        fp8_scale_inv=(1 / scale).reshape(1),
        fp8_dtype=_E4M3,
        quantizer=te.Float8CurrentScalingQuantizer(_E4M3, "cpu"),
        device="cpu",
    )


def _by_blocks(matrix: torch.Tensor, dtype: torch.dtype) -> te.Float8BlockwiseQTensor:
    rows, columns = matrix.shape
    padded = pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(amax > 0, LARGEST / amax, 1.0)
    scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)  # a power of two
    data = (blocks * scale).to(torch.float8_e4m3fn).flatten(2).flatten(0, 1)
    inverse = 1 / scale[:, 0, :, 0]
    return te.Float8BlockwiseQTensor(
        shape=matrix.shape,
        dtype=dtype,
        rowwise_data=data[:rows, :columns].contiguous().view(torch.uint8),
        rowwise_scale_inv=pad(inverse, (0, -inverse.shape[1] % 4)),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=_E4M3,
        quantizer=te.Float8BlockQuantizer(_E4M3, rowwise=True, columnwise=True),
        is_2D_scaled=True,
        device="cpu",
    )


def _by_rows_and_columns(matrix: torch.Tensor, dtype: torch.dtype) -> te.MXFP8Tensor:
    rows, row_scales = _by_mx_rows(matrix)
    # Both roundings are mostly the same. Here columns are of larger numbers, so that it is seen
    # whether a GEMM took them, and whether they were made of the rows.
    columns, column_scales = (each.T.contiguous() for each in _by_mx_rows(1.1 * matrix.T))
    quantiser = te.MXFP8Quantizer(_E4M3)
    scales = [
        pad(scale, (0, columns - scale.shape[1], 0, rows - scale.shape[0]))
        for scale, (rows, columns) in (
            (row_scales, quantiser.get_scale_shape(matrix.shape, False)),
            (column_scales, quantiser.get_scale_shape(matrix.shape, True)),
        )
    ]
    return te.MXFP8Tensor(
        shape=matrix.shape,
        dtype=dtype,
        rowwise_data=rows,
        rowwise_scale_inv=scales[0],
        columnwise_data=columns,
        columnwise_scale_inv=scales[1],
        fp8_dtype=_E4M3,
        quantizer=quantiser,
        with_gemm_swizzled_scales=False,
        device="cpu",
    )


def _by_mx_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Data [n, m], and exponents [n, m / 32] with a bias of 127; uint8."""
    blocks = matrix.reshape(matrix.shape[0], -1, MX_BLOCK)
    amax = blocks.abs().amax(dim=2).clamp(min=1e-30)
    exponent = (amax / LARGEST).log2().ceil()
    data = (blocks * (-exponent).exp2()[:, :, None]).to(torch.float8_e4m3fn)
    return data.view(torch.uint8).reshape(matrix.shape), (exponent + 127).to(torch.uint8)


def read_numbers(weight: Any, *, rowwise: bool = True) -> torch.Tensor:
    """What a GEMM in FP8 would take, in fp32; of the columns, too, the matrix as it is."""
    if isinstance(weight, te.Float8Tensor):
        if not rowwise:
            assert weight._transpose is not None, "there is no transpose"
            assert not weight._transpose_invalid, "the transpose is not valid"
        data = weight._data if rowwise else weight._transpose.T
        return _to_fp32(data) * weight._scale_inv
    way = "row" if rowwise else "column"
    data = getattr(weight, f"_{way}wise_data")
    scales = getattr(weight, f"_{way}wise_scale_inv")
    assert data is not None, f"no {way}s"
    if isinstance(weight, te.Float8BlockwiseQTensor):
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        numbers = _to_fp32(data) * spread[: data.shape[0], : data.shape[1]]
        return numbers if rowwise else numbers.T
    exponents = torch.where(scales == 255, torch.nan, scales.float() - 127)  # E8M0's NaN
    spread = exponents.exp2().repeat_interleave(MX_BLOCK, 1 if rowwise else 0)
    return _to_fp32(data) * spread[: data.shape[0], : data.shape[1]]


def _to_fp32(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.float8_e4m3fn).float()


def quantise_experts(chunks: list[torch.nn.Module], recipe: Recipe) -> None:
    """Make the experts' weights parameters as under `--fp8-param-gather`."""
    for name, module in list(chunks[0].named_modules()):
        if ".experts.linear_fc" in name:
            for key, weight in list(module.named_parameters(recurse=False)):
                if weight.dim() < 2:  # a bias
                    continue
                quantised = torch.nn.Parameter(quantise(weight, recipe))
                vars(quantised).update(
                    {k: v for k, v in vars(weight).items() if not hasattr(quantised, k)}
                )
                setattr(module, key, quantised)
