"""Experts whose parameters are quantised (`--fp8-param-gather`): what a borrower gets.

STAND-INS: the quantisers, written down from what Transformer Engine documents. Its tensor classes
and their way back to bf16 are real; no GEMM in FP8 runs here.
"""

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

from te_experts import TE_CONFIG, use_te_experts
from transformer_engine.pytorch import DType
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (
    Float8BlockQuantizer,
    Float8BlockwiseQTensor,
)

from megatron_llep.experts.quantised import check_restorable
from megatron_llep.integration.convert import convert_model
from support.layout import Layout
from support.llep import EAGER, assert_same_run, note_decisions
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, train

pytestmark = pytest.mark.te

LARGEST = 448.0
BLOCK = 128


def to_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[n, m] -> [n / 128, 128, m / 128, 128], filled up with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def round_down_to_power_of_2(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers.view(torch.int32) & 0x7F800000).view(torch.float32)


def quantise(matrix: torch.Tensor, *, pow_2: bool = True) -> Float8BlockwiseQTensor:
    """As the blockwise recipe does weights: one scale for 128 x 128 numbers."""
    blocks = to_blocks(matrix.detach().float())
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(amax > 0, LARGEST / amax, 1.0)
    scale = round_down_to_power_of_2(scale) if pow_2 else scale
    data = (blocks * scale).to(torch.float8_e4m3fn).flatten(2).flatten(0, 1)
    inverse = 1 / scale[:, 0, :, 0]
    inverse = torch.nn.functional.pad(inverse, (0, -inverse.shape[1] % 4))
    rows, columns = matrix.shape
    return Float8BlockwiseQTensor(
        shape=matrix.shape,
        dtype=matrix.dtype,
        rowwise_data=data[:rows, :columns].contiguous().view(torch.uint8),
        rowwise_scale_inv=inverse,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=Float8BlockQuantizer(
            DType.kFloat8E4M3, rowwise=True, columnwise=True, force_pow_2_scales=pow_2
        ),
        is_2D_scaled=True,
    )


def make_master() -> torch.Tensor:
    """fp32 [384, 256], each block of another size, some with a largest number that rounds down."""
    torch.manual_seed(0)
    master = torch.randn(3 * BLOCK, 2 * BLOCK) * 0.02
    blocks = to_blocks(master)
    blocks *= torch.logspace(-6, 6, 6).view(3, 1, 2, 1)
    blocks[0, 0, 0, 0] = 225 / 1024  # times its scale 225, which E4M3 has as 224
    blocks[1, :, 1] = 0
    return blocks.flatten(2).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_borrower_restores_the_numbers(dtype):
    at_home = quantise(make_master().to(dtype))
    lent = at_home.dequantize()
    assert lent.dtype == dtype
    borrowed = quantise(lent)
    assert torch.equal(borrowed.dequantize(dtype=torch.float32), at_home.dequantize().float())
    scales_apart = at_home._rowwise_scale_inv != borrowed._rowwise_scale_inv
    assert scales_apart.any(), "no block has a larger scale the second time"


def test_with_other_scales_it_would_not():
    at_home = quantise(make_master(), pow_2=False)
    borrowed = quantise(at_home.dequantize(dtype=torch.bfloat16), pow_2=False)
    assert not torch.equal(borrowed.dequantize(), at_home.dequantize())

    module = torch.nn.Module()
    module.weight0 = torch.nn.Parameter(quantise(make_master()))
    check_restorable(module)
    module.weight1 = torch.nn.Parameter(at_home)
    with pytest.raises(ValueError, match=r"--fp8-param-gather: the scales of experts\.weight1"):
        check_restorable(module)
    module.weight1 = torch.nn.Parameter(quantise(make_master().half()))
    with pytest.raises(ValueError, match=r"--fp8-param-gather: torch.float16 does not hold"):
        check_restorable(module)


def quantise_experts(chunks: Chunks) -> None:
    for name, module in list(chunks[0].named_modules()):
        if ".experts.linear_fc" in name:
            for key, weight in list(module.named_parameters(recurse=False)):
                quantised = torch.nn.Parameter(quantise(weight))
                vars(quantised).update(
                    {k: v for k, v in vars(weight).items() if not hasattr(quantised, k)}
                )
                setattr(module, key, quantised)


def test_training_is_that_of_plain_megatron(monkeypatch):
    """As far as the GEMMs: these take the quantised numbers in fp32."""

    def update(self, src, dst, *, noop_flag=None):
        dst.copy_from_storage(quantise(src.reshape(dst.shape)))
        return dst

    monkeypatch.setattr(Float8BlockQuantizer, "update_quantized", update)
    run = Run(
        layout=Layout(ep=2),
        routing=Routing("hot"),
        spec=use_te_experts,
        config=TE_CONFIG,
        ddp={"overlap_grad_reduce": True},
    )

    def work(rank, size):
        decisions = []

        def lend(chunks: Chunks) -> None:
            quantise_experts(chunks)
            convert_model(chunks, EAGER)
            note_decisions(chunks, decisions)

        plain = train(run, transform_model=quantise_experts)
        lending = train(run, transform_model=lend)
        assert any(isinstance(each, Float8BlockwiseQTensor) for each in lending.parameters.values())
        for result in (plain, lending):
            for name, each in result.parameters.items():
                if isinstance(each, Float8BlockwiseQTensor):
                    result.parameters[name] = each.dequantize()
        assert_same_run(lending, plain)
        return sum(len(decision.plan.transfers) for decision in decisions)

    assert all(run_ranks(work, 2, timeout=120))
