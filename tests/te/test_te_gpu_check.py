"""What tools/gpu_check.py does where Transformer Engine is, over stand-ins for TE's kernels."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from gpu_checks import layer_run, lending_run
from gpu_checks.critical_path import make_case, shrink
from gpu_checks.demands import PLAIN
from gpu_checks.lending_run import Kind, ModelSize

from megatron_llep.offline.simulator.models import MODELS
from support.layout import Layout, use_layout
from support.one_rank import be_alone
from support.ranks import run_ranks

pytestmark = pytest.mark.te


def test_the_critical_path_times_its_grouped_gemms(gemms):
    """Two linears, forward and twice in backward; lent experts apart."""

    def work(rank, size):
        model = shrink(MODELS["gpt-oss-120b"])
        found = []
        with be_alone(3, 8):
            layers = layer_run.RankLayers(model, "te", 3, 8)
            layers.route(make_case(model, "hot-95-1", PLAIN).counts)
            for method in (PLAIN, "tolerant"):
                del gemms[:]
                layers.run(method)
                found.append((layers.lent, len(gemms)))
            main_grads = [parameter.main_grad for parameter in layers._experts]
        assert sum(grad.abs().sum() for grad in main_grads) > 0
        return found

    ((plain, lending),) = run_ranks(work, 1)
    assert plain == (0, 6)
    assert lending == (7, 12)


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
