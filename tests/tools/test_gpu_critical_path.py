"""The critical path of tools/gpu_check.py: the work it times, and the ranks it runs.

Letters: G slots, N pairs, H hidden size, F inner size.
"""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llep.offline.simulator.models import MODELS
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner import make_plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from gpu_checks import critical_path, rank_work
from gpu_checks.experts import Slab, run_apart, run_together
from gpu_checks.results import check_experts
from gpu_checks.stopwatch import estimate_bytes, run_once
from gpu_checks.te_experts import TransformerEngineExperts

TOKENS, NATIVE = [3, 0, 5, 1, 0], 3
H, F = 16, 8


def make_slab(dtype=torch.float32):
    return Slab.allocate(slots=5, hidden=H, ffn=F, dtype=dtype, device=torch.device("cpu"))


class _Product(torch.autograd.Function):
    """[n, H] by a weight whose gradient goes to its main_grad, as in fused kernels."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows)
        ctx.weight = weight
        return rows @ weight.T

    @staticmethod
    def backward(ctx, grad):
        ctx.weight.main_grad += grad.T @ ctx.saved_tensors[0]
        return grad @ ctx.weight, None


class StandIn(torch.nn.Module):
    """What te.GroupedLinear does."""

    def __init__(self, num_gemms, in_features, out_features, **options):
        super().__init__()
        assert options == {
            "bias": False,
            "params_dtype": torch.float32,
            "fuse_wgrad_accumulation": True,
            "device": "meta",
        }
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, device="meta")
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight))

    def forward(self, rows, m_splits):
        outputs = []
        for i, part in enumerate(rows.split(m_splits)):
            weight = getattr(self, f"weight{i}")
            outputs.append(_Product.apply(part, weight))
        return torch.cat(outputs)


def make_experts(kind, monkeypatch):
    if kind != "te":
        return {"apart": run_apart, "together": run_together}[kind]
    package, module = types.ModuleType("transformer_engine"), types.ModuleType("pytorch")
    module.GroupedLinear = StandIn
    package.pytorch = module
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    return TransformerEngineExperts()


@pytest.mark.parametrize("kind", ["apart", "together", "te"])
def test_experts_compute_what_autograd_does(kind, monkeypatch):
    experts = make_experts(kind, monkeypatch)
    slab = make_slab()
    slab.fc1.mul_(50)
    slab.fc2.mul_(50)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(TOKENS), H, generator=generator)
    grad = torch.randn(sum(TOKENS), H, generator=generator)

    fc1, fc2 = (w.clone().requires_grad_() for w in (slab.fc1, slab.fc2))
    leaf = rows.clone().requires_grad_()
    parts = []
    for slot, part in enumerate(leaf.split(TOKENS)):
        gate, up = (part @ fc1[slot].T).chunk(2, dim=1)
        parts.append(torch.nn.functional.silu(gate) * up @ fc2[slot].T)
    expected = torch.cat(parts)
    expected.backward(grad)

    outputs, backward = experts(slab, rows, TOKENS, NATIVE)
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.testing.assert_close(torch.cat(backward(grad.clone())), leaf.grad)
    torch.testing.assert_close(slab.fc1_grad, fc1.grad)
    torch.testing.assert_close(slab.fc2_grad, fc2.grad)
    experts(slab, rows, TOKENS, NATIVE)[1](grad.clone())
    torch.testing.assert_close(slab.fc1_grad, 2 * fc1.grad, msg="gradients must add up")


@pytest.mark.parametrize("kind", ["apart", "together", "te"])
def test_backward_does_not_need_the_output(kind, monkeypatch):
    experts = make_experts(kind, monkeypatch)
    slab = make_slab()
    one = run_once(experts, slab, torch.randn(sum(TOKENS), H), TOKENS, NATIVE)
    assert one.forward_seconds > 0
    assert one.backward_seconds > 0
    assert one.peak_bytes is None, "torch counts no memory on CPUs"
    assert slab.fc1_grad[0].abs().sum() > 0


@pytest.mark.parametrize("experts", [run_apart, run_together])
def test_what_is_timed_is_checked_first(experts):
    tokens = [40, 0, 90, 1, 70]
    slab = make_slab()
    rows = torch.randn(sum(tokens), H, generator=torch.Generator().manual_seed(1))
    check_experts(experts, slab, rows, tokens, NATIVE)
    assert not slab.fc1_grad.any()

    def spoil(what):
        def run(*args):
            outputs, backward = experts(*args)
            spoiled = outputs if what == "output" else None
            if spoiled:
                spoiled[-1][-1] *= 2

            def run_backward(grad):
                grads = backward(grad)
                if what == "rows":
                    grads[0][0] = 0
                if what == "weight":
                    slab.fc2_grad[3] *= 0.9
                return grads

            return outputs, run_backward

        return run

    for what, fault in {
        "output": "output of slot 4",
        "rows": "gradient of slot 0's rows",
        "weight": "gradient of slot 3's second weight",
    }.items():
        slab.fc1_grad.zero_()
        slab.fc2_grad.zero_()
        with pytest.raises(RuntimeError, match=fault):
            check_experts(spoil(what), slab, rows, tokens, NATIVE)


def test_lent_experts_have_gemms_of_their_own(monkeypatch):
    """Where there are some; together, there is one per linear and direction."""
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm

    def count(*args, **kwargs):
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", count)
    slab, rows = make_slab(), torch.randn(sum(TOKENS), H)
    for experts, num_native, expected in (
        (run_apart, NATIVE, 12),
        (run_apart, len(TOKENS), 6),
        (run_together, NATIVE, 6),
    ):
        del calls[:]
        run_once(experts, slab, rows, TOKENS, num_native)
        assert len(calls) == expected


@pytest.mark.parametrize("planner", ["tolerant", "exact", "lla"])
@pytest.mark.parametrize("workload", ["balanced", "hot-30-16", "hot-80-4", "lognormal-2"])
def test_every_rank_that_could_be_slowest_is_run(planner, workload):
    counts = make_counts(workload, num_ranks=8, num_experts=32, tokens_per_rank=4096, top_k=1)
    plan = make_plan(counts, planner=planner)
    loads = [rank_work.slot_load(plan, rank) for rank in range(8)]
    assert [sum(load) for load in loads] == plan.load_per_rank_after.tolist()
    foreign = (plan.foreign_experts >= 0).sum(axis=1)
    assert [len(load) for load in loads] == (plan.experts_per_rank + foreign).tolist()
    chosen = rank_work.choose_loads(loads)
    assert max(map(sum, chosen)) == max(map(sum, loads))
    assert max(map(len, chosen)) == max(map(len, loads))
    assert max(map(max, chosen)) >= 0.99 * max(map(max, loads)) - 8


def test_ranks_with_no_more_to_do_are_left_out():
    hot, cold, other = (900, 10, 10, 10), (10, 10, 10, 10), (11, 9, 10, 12)
    assert rank_work.choose_loads([hot, cold, other, (0, 0, 0, 0)]) == [hot]
    # As many tokens, in more slots or in other slots' sizes: each could be slower.
    lent = (400, 10, 10, 10, 500)
    assert set(rank_work.choose_loads([hot, lent])) == {hot, lent}
    assert set(rank_work.choose_loads([(600, 0, 0), (200, 200, 200)])) == {
        (600, 0, 0),
        (200, 200, 200),
    }


def test_the_paper_grid_is_that_of_the_paper():
    """95% of all pairs go into expert 0, and a planner's worst rank has an eighth of them."""
    shape = MODELS["gpt-oss-120b"].layer
    plain, lending = rank_work.make_cases(shape, "hot-95-1", ("plain", "exact"), 1024)
    assert plain.counts.sum() == 8 * 1024 * shape.top_k
    assert plain.counts[:, 0].sum() == pytest.approx(0.95 * plain.counts.sum(), rel=1e-3)
    assert plain.plan.is_fallback
    assert plain.plan_seconds == 0
    assert lending.plan_seconds > 0
    assert lending.plan.load_per_rank_after.max() == np.ceil(lending.counts.sum() / 8)


def test_too_large_a_model_is_refused_with_a_size_that_fits(monkeypatch):
    model = MODELS["deepseek-v3"]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 24 * 2**30))
    cuda = torch.device("cuda")
    with pytest.raises(critical_path.TooLargeError, match=r"GiB are free; try --tokens (\d+)") as e:
        critical_path.check_fits(model, slots=34, pairs=1_000_000, device=cuda)
    tokens = int(str(e.value).split()[-1])
    assert 1024 <= tokens < model.tokens_per_rank
    pairs = 1_000_000 * tokens // model.tokens_per_rank
    critical_path.check_fits(model, slots=34, pairs=pairs, device=cuda)
    with pytest.raises(critical_path.TooLargeError, match="weights alone"):
        critical_path.check_fits(model, slots=340, pairs=1_000_000, device=cuda)


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_that_of_the_estimate():
    cuda = torch.device("cuda")
    sizes = {"slots": 8, "hidden": 1024, "ffn": 512}
    slab = Slab.allocate(**sizes, dtype=torch.bfloat16, device=cuda)
    rows = torch.empty(65536, 1024, dtype=torch.bfloat16, device=cuda).normal_()
    tokens = [16384, 0, 8192, 8192, 32768, 0, 0, 0]
    run_once(run_apart, slab, rows, tokens, 4)
    one = run_once(run_apart, slab, rows, tokens, 4)
    assert one.device_allocations == 0, "the first run left the memory in torch's cache"
    assert one.forward_seconds > 0
    assert one.backward_seconds > one.forward_seconds
    assert one.peak_bytes is not None
    # The estimate is of what lies on the device, where one tensor serves as rows and gradient.
    on_device = one.peak_bytes - rows.nbytes
    estimate = estimate_bytes(**sizes, pairs=len(rows))
    assert 0.6 * estimate < on_device < 1.05 * estimate
    assert slab.fc1_grad[0].abs().sum() > 0
    assert slab.fc1_grad[1].abs().sum() == 0
