"""What tools/gpu_check.py does where Transformer Engine is, over stand-ins for TE's kernels."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from gpu_checks import lending_run
from gpu_checks.experts import Slab, run_apart
from gpu_checks.lending_run import Kind, ModelSize
from gpu_checks.te_experts import TransformerEngineExperts

from support.layout import Layout, use_layout
from support.ranks import run_ranks

pytestmark = pytest.mark.te

TOKENS, NATIVE, H, F = [3, 0, 5, 1, 0], 3, 16, 8


def test_the_critical_path_computes_what_torch_does(gemms):
    """Natives and lent experts in a grouped GEMM each, twice, on the slab's own memory."""
    generator = torch.Generator().manual_seed(1)
    rows, grad = (torch.randn(sum(TOKENS), H, generator=generator) for _ in range(2))
    found = []
    for experts in (TransformerEngineExperts(), run_apart):
        slab = Slab.allocate(
            slots=len(TOKENS), hidden=H, ffn=F, dtype=torch.float32, device=torch.device("cpu")
        )
        for _ in range(2):
            outputs, backward = experts(slab, rows, TOKENS, NATIVE)
            grads = backward(grad.clone())
        found.append([*outputs, *grads, slab.fc1_grad, slab.fc2_grad])
    assert len(gemms) == 2 * 2 * 6
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)


def test_the_compared_model_adds_weight_gradients_in_its_gemms(gemms, monkeypatch):
    """All of TE's linears do; Megatron's own output layer could only with apex."""

    def work(rank, size):
        config = partial(lending_run.TransformerConfig, use_cpu_initialization=True)
        monkeypatch.setattr(lending_run, "TransformerConfig", config)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with use_layout(Layout()):
            kind = Kind(dtype=torch.bfloat16, transformer_engine=True)
            model = lending_run._build_model(ModelSize(hidden=64, ffn_hidden=64), kind, 1)
        assert not model.output_layer.gradient_accumulation_fusion
        fused = [getattr(module, "fuse_wgrad_accumulation", None) for module in model.modules()]
        assert fused.count(True) == 2 * 4  # layers; linears of attention and experts
        assert False not in fused

    run_ranks(work, 1)
