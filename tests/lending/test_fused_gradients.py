"""Kernels that add weight gradients to `main_grad` by themselves, natives and foreign alike."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import layers

from support.layout import Layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, train


def add_weight_gradient(inputs: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
    """What apex's CUDA kernel does, for the CPU: main_grad += grad^T inputs."""
    main_grad.add_(grad.t().matmul(inputs))


KERNELS = SimpleNamespace(
    wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
)


@pytest.mark.parametrize("ddp", [{}, {"overlap_grad_reduce": True}], ids=["ddp", "overlapped"])
@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
def test_fused_accumulation(ddp, foreign_weights):
    def work(rank, size):
        settings = {
            "layout": Layout(ep=2, dp=4),
            "routing": Routing("natural"),
            "micro_batches": 8,
            "steps": 3,
            "ddp": ddp,
        }
        plain = train(Run(**settings))
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", KERNELS, raising=False)
            monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
            run = Run(**settings, config={"gradient_accumulation_fusion": True})
            lending = train_with_llep(run, replace(EAGER, foreign_weights=foreign_weights))
        assert lending.observed.transfers > 0
        assert_same_run(lending, plain)

    run_ranks(work, 4, timeout=120)
