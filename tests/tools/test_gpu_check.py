"""tools/gpu_check.py: what it runs, how it judges, and a trial run of the whole on the CPU.

Letters: G slots, N pairs, H hidden size, F inner size.
"""

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llep.planner import make_plan
from megatron_llep.simulator.models import MODELS
from megatron_llep.workloads import make_counts

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check  # noqa: E402
from gpu_checks import critical_path, demands, paths, rank_work  # noqa: E402
from gpu_checks.comparison import compare  # noqa: E402
from gpu_checks.correctness import judge, merge  # noqa: E402
from gpu_checks.critical_path import Row  # noqa: E402
from gpu_checks.experts import Slab, run_grouped_mm  # noqa: E402
from gpu_checks.kernels import judge_pytest  # noqa: E402
from gpu_checks.lending_run import Outcome  # noqa: E402
from gpu_checks.placement import judge_placement  # noqa: E402
from gpu_checks.section import Section, format_summary  # noqa: E402
from gpu_checks.stopwatch import estimate_bytes, run_once  # noqa: E402
from gpu_checks.te_experts import TransformerEngineExperts  # noqa: E402

TOKENS = [3, 0, 5, 1, 0]
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
    if kind == "grouped_mm":
        return run_grouped_mm
    package, module = types.ModuleType("transformer_engine"), types.ModuleType("pytorch")
    module.GroupedLinear = StandIn
    package.pytorch = module
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    return TransformerEngineExperts()


@pytest.mark.parametrize("kind", ["grouped_mm", "te"])
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

    output, backward = experts(slab, rows, TOKENS)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(backward(grad.clone()), leaf.grad)
    torch.testing.assert_close(slab.fc1_grad, fc1.grad)
    torch.testing.assert_close(slab.fc2_grad, fc2.grad)
    experts(slab, rows, TOKENS)[1](grad.clone())
    torch.testing.assert_close(slab.fc1_grad, 2 * fc1.grad, msg="gradients must add up")


@pytest.mark.parametrize("kind", ["grouped_mm", "te"])
def test_backward_does_not_need_the_output(kind, monkeypatch):
    experts = make_experts(kind, monkeypatch)
    slab = make_slab()
    one = run_once(experts, slab, torch.randn(sum(TOKENS), H), TOKENS)
    assert one.forward_seconds > 0
    assert one.backward_seconds > 0
    assert one.peak_bytes is None, "torch counts no memory on CPUs"
    assert slab.fc1_grad[0].abs().sum() > 0


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


def make_row(workload, method, seconds, mib=1000, **changes):
    fields = {
        "model": "deepseek-v3",
        "experts": "grouped_mm",
        "workload": workload,
        "method": method,
        "imbalance": 1.0,
        "lent": 0,
        "forward_seconds": seconds / 3,
        "expert_seconds": seconds,
        "exchange_seconds": 0.0,
        "lending_seconds": 0.0,
        "returning_seconds": 0.0,
        "plan_seconds": 0.0,
        "peak_bytes": mib * 2**20,
    }
    return Row(**{**fields, **changes})


# The hot one takes 7.6 s in all.
BASE = [
    make_row("balanced", "plain", 1.0),
    make_row("hot-95-1", "plain", 6.6, mib=5000, exchange_seconds=1.0),
]


@pytest.mark.parametrize(
    ("row", "slow"),
    [
        (make_row("hot-95-1", "tolerant", 7.6 / 5.2), False),
        (make_row("hot-95-1", "tolerant", 7.6 / 5.0), True),
        (make_row("hot-95-1", "tolerant", 7.6 / 5.2, returning_seconds=0.1), True),
        (make_row("hot-95-1", "lla", 7.6 / 5.0), False),  # held to it is the default planner
        (make_row("balanced", "lla", 1.019), False),
        (make_row("balanced", "lla", 1.0, plan_seconds=0.021), True),
    ],
)
def test_what_is_too_slow(row, slow):
    assert bool(demands.find_slow([*BASE, row])) == slow


def test_what_is_too_heavy():
    rows = [
        *BASE,
        make_row("hot-95-1", "exact", 1.0, mib=1101),
        make_row("hot-80-1", "exact", 1.0, mib=1099),
    ]
    (short,) = demands.find_heavy(rows)
    assert "hot-95-1, exact: 1.10 of balanced" in short


def test_the_tables_show_the_paper_beside_what_was_found():
    rows = [*BASE, make_row("hot-95-1", "tolerant", 1.9, lending_seconds=0.1)]
    line = demands.format_time_table(rows).splitlines()[-1].split()
    assert line[3] == "tolerant"
    speedup, forward, experts, paper = map(float, line[-4:])
    assert speedup == pytest.approx(7.6 / 2.0, abs=0.01)
    assert forward == pytest.approx((6.6 / 3 + 0.5) / (1.9 / 3 + 0.1), abs=0.01)
    assert experts == pytest.approx(6.6 / 1.9, abs=0.01)
    assert paper == 5.1
    assert "5.00" in demands.format_memory_table(rows).splitlines()[2]


def make_job(judged):
    options = ["--device", "cpu", "--quick"]
    job = gpu_check.make_path_job(gpu_check.build_parser().parse_args(options))
    assert not job.judged
    return replace(job, judged=judged)


def test_demands_decide_only_where_they_apply(capsys):
    rows = [*BASE, make_row("hot-95-1", "tolerant", 7.0, mib=4000)]
    assert paths.judge_time(make_job(True), rows, []).state == "FAILED"
    assert paths.judge_memory(make_job(True), rows).state == "FAILED"
    assert paths.judge_time(make_job(False), rows, []).state == "not judged"
    good = [*BASE, make_row("hot-95-1", "tolerant", 1.0)]
    assert paths.judge_time(make_job(True), good, []).state == "passed"
    assert paths.judge_time(make_job(True), good, ["te: too large"]).state == "FAILED"
    assert paths.judge_memory(make_job(True), good).state == "passed"
    unknown = [replace(row, peak_bytes=None) for row in rows]
    assert paths.judge_memory(make_job(True), unknown).state == "skipped"
    assert "one after another" in capsys.readouterr().out


def make_outcome(gradient, loss=1.0, lent=1):
    return Outcome(losses=[loss], gradients={"w": torch.tensor(gradient)}, lent=lent)


@pytest.mark.parametrize(
    ("lending", "fault"),
    [
        (make_outcome([1.0, 2.0]), ""),
        (make_outcome([1.0, 2.001]), "gradient of w"),
        (make_outcome([1.0, float("nan")]), "gradient of w"),
        (make_outcome([1.0, 2.0], loss=1.001), "losses"),
        (make_outcome([1.0, 2.0], loss=float("nan")), "losses"),
        (make_outcome([1.0, 2.0], lent=0), "nothing was lent"),
    ],
)
def test_a_difference_in_fp32_is_found(lending, fault):
    found = compare("local layers, float32", lending, make_outcome([1.0, 2.0], lent=0), None)
    assert judge(found).startswith(fault) or fault in judge(found)
    assert bool(judge(found)) == bool(fault)


def test_bf16_is_held_to_the_distance_of_plain_from_fp32():
    exact, plain = make_outcome([1.0, 2.0]), make_outcome([1.02, 2.0])
    near, far = make_outcome([1.0, 2.03]), make_outcome([1.0, 2.05])
    assert not judge(compare("bfloat16", near, plain, exact))
    assert "further from fp32" in judge(compare("bfloat16", far, plain, exact))
    worst = merge((compare("bfloat16", near, plain, exact), compare("bfloat16", far, plain, exact)))
    assert worst.control_ratio == pytest.approx(2.5, rel=1e-3)


def test_the_verdict_on_the_gpu_tests():
    assert judge_pytest(0, "...\n=== 3 passed, 9 deselected in 2.00s ===\n").state == "passed"
    assert judge_pytest(5, "== 9 deselected in 2.00s ==").state == "skipped"
    assert judge_pytest(0, "== 3 skipped in 2.00s ==").state == "skipped"
    failed = judge_pytest(1, "== 1 failed, 2 passed in 2.00s ==")
    assert failed.state == "FAILED"
    assert failed.reason == "1 failed, 2 passed in 2.00s"


@pytest.mark.parametrize(
    ("equal", "error", "state"),
    [(True, 1e-3, "passed"), (False, 1e-3, "FAILED"), (True, 1e-2, "FAILED")],
)
def test_the_verdict_on_placement(equal, error, state, capsys):
    found = {"cases": 5, "equal": equal, "worst_sum_error": error}
    assert judge_placement(found | {"milliseconds": {"list_pairs": 0.125}}).state == state
    assert "0.125 ms" in capsys.readouterr().out


def test_a_section_that_breaks_fails_and_the_others_run(monkeypatch, capsys, tmp_path):
    def break_down(**_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(gpu_check, "check_correctness", break_down)
    output = tmp_path / "found.json"
    options = ["--device", "cpu", "--quick", "--sections", "correctness", "kernels"]
    assert gpu_check.main([*options, "--output", str(output)]) == 1
    states = {s["name"]: s["state"] for s in json.loads(output.read_text())["sections"]}
    assert states == {"correctness": "FAILED", "kernels": "skipped"}
    assert "correctness: FAILED: no such luck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--ep", "1"], "--ep 1"),
        (["--rounds", "0"], "--rounds 0"),
        (["--tokens", "0"], "--tokens 0"),
        (["--workloads", "nonsense"], "nonsense"),
        (["--cost-model", "nonsense"], "nonsense"),
    ],
)
def test_unusable_options_are_refused(options, fault, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--device", "cpu", *options])
    assert stop.value.code == 2
    assert fault in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([])
    assert stop.value.code == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_the_judged_run_is_that_of_the_paper(monkeypatch):
    """All defaults, on a GPU: the sizes of Figure 4, and the results' own place."""
    args = gpu_check.build_parser().parse_args([])
    job = gpu_check.make_path_job(args)
    assert job.judged
    assert [model.tokens_per_rank for model in job.models] == [32768, 16384, 16384]
    assert args.output == ROOT / "benchmarks" / "results" / "gpu_check.json"
    smaller = gpu_check.build_parser().parse_args(["--tokens", "4096"])
    assert not gpu_check.make_path_job(smaller).judged


def test_a_trial_run_of_the_whole(tmp_path):
    output = tmp_path / "gpu_check.json"
    options = ["--device", "cpu", "--quick", "--ep", "2", "--output", str(output), "--rounds", "1"]
    options += ["--workloads", "hot-95-1", "--models", "gpt-oss-120b", "--planners", "tolerant"]
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert "torch" in found["versions"]
    sections = {section["name"]: section for section in found["sections"]}
    assert {name: section["state"] for name, section in sections.items()} == {
        "correctness": "passed",
        "placement": "skipped",
        "kernels": "skipped",
        "critical path": "not judged",
        "memory": "skipped",
    }
    comparisons = sections["correctness"]["data"]["ep2"]["comparisons"]
    assert [c["what"].split(",")[1].strip() for c in comparisons] == [
        *("float32", "bfloat16", "bfloat16"),
    ]
    assert all(c["lent"] > 0 for c in comparisons)
    rows = {(r["workload"], r["method"]): r for r in sections["critical path"]["data"]["rows"]}
    assert set(rows) == {
        (workload, method)
        for workload in ("balanced", "hot-95-1")
        for method in ("plain", "tolerant")
    }
    assert rows["hot-95-1", "plain"]["imbalance"] > 7
    assert rows["hot-95-1", "tolerant"]["imbalance"] <= 1.05
    assert all(row["expert_seconds"] > row["forward_seconds"] > 0 for row in rows.values())


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_that_of_the_estimate():
    cuda = torch.device("cuda")
    sizes = {"slots": 8, "hidden": 1024, "ffn": 512}
    slab = Slab.allocate(**sizes, dtype=torch.bfloat16, device=cuda)
    rows = torch.empty(65536, 1024, dtype=torch.bfloat16, device=cuda).normal_()
    tokens = [32768, 0, 16384, 16384, 0, 0, 0, 0]
    run_once(run_grouped_mm, slab, rows, tokens)
    one = run_once(run_grouped_mm, slab, rows, tokens)
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


@pytest.mark.gpu
@pytest.mark.parametrize("ep", [2, 4])
def test_llep_is_plain_megatron_on_gpus(ep, tmp_path):
    output = tmp_path / "found.json"
    options = ["--quick", "--sections", "correctness", "--ep", str(ep), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (section,) = json.loads(output.read_text())["sections"]
    assert section["state"] == "passed"
    gpus = torch.cuda.device_count()
    world = section["data"][f"ep{ep}"]["world"]
    assert ("NCCL" in world) == (gpus >= ep)


def test_the_summary_names_every_section():
    sections = [Section(name="a", state="passed"), Section(name="bc", state="FAILED", reason="why")]
    assert format_summary(sections).splitlines() == ["a   passed", "bc  FAILED: why"]
