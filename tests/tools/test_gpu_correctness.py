"""The correctness section of tools/gpu_check.py: how it compares, and what it asks of a machine."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llep.config import LLEPConfig
from megatron_llep.offline.workloads import route_tokens
from megatron_llep.planner import make_plan
from support.layout import Layout, use_layout
from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from gpu_checks.comparison import Outcome, compare, find_shortfall, merge  # noqa: E402
from gpu_checks.correctness import PLANNERS, WORKLOADS  # noqa: E402
from gpu_checks.correctness_ranks import LENDS_WHEREVER_IT_CAN, check_collectives  # noqa: E402
from gpu_checks.lending_run import Kind, ModelSize, run_model  # noqa: E402


class Collectives(TorchDispatchMode):
    """Notes which ones are started, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split(".")[0].split("::")
        if namespace == "c10d":
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def test_every_collective_was_tried_before():
    """gloo has some of them for CPUs only, which a machine with one GPU must be told first."""

    def work(rank, size):
        cpu, found = torch.device("cpu"), {}
        with use_layout(Layout(ep=2)):
            for name, call in {
                "tried": lambda: check_collectives(cpu),
                "called": lambda: run_model(
                    ModelSize(hidden=32, ffn_hidden=64, num_experts=8, sequence_length=16),
                    Kind(dtype=torch.float32),
                    "hot-95-1",
                    LLEPConfig(min_tokens_per_gemm=1),
                    cpu,
                ),
            }.items():
                with Collectives() as collectives:
                    call()
                found[name] = collectives.names
        return found

    for found in run_ranks(work, 2):
        assert {"alltoall_base_", "_allgather_base_", "allreduce_"} <= found["called"]
        assert found["called"] <= found["tried"]


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("ep", [2, 4])
def test_every_comparison_lends(ep, workload, planner):
    """Else it would compare nothing, and fail."""
    size, llep = ModelSize(), LENDS_WHEREVER_IT_CAN
    routed = [
        route_tokens(
            workload,
            num_ranks=ep,
            num_experts=size.num_experts,
            tokens_per_rank=size.sequence_length * size.micro_batch_size,
            top_k=size.top_k,
            rank=rank,
        )
        for rank in range(ep)
    ]
    counts = np.stack([np.bincount(r.ravel(), minlength=size.num_experts) for r in routed])
    plan = make_plan(
        counts,
        planner=planner,
        imbalance_threshold=llep.imbalance_threshold,
        min_tokens_per_gemm=llep.min_tokens_per_gemm,
    )
    assert not plan.is_fallback


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
    assert find_shortfall(found).startswith(fault) or fault in find_shortfall(found)
    assert bool(find_shortfall(found)) == bool(fault)


def test_bf16_is_held_to_the_distance_of_plain_from_fp32():
    exact, plain = make_outcome([1.0, 2.0]), make_outcome([1.02, 2.0])
    near, far = make_outcome([1.0, 2.03]), make_outcome([1.0, 2.05])
    assert not find_shortfall(compare("bfloat16", near, plain, exact))
    assert "further from fp32" in find_shortfall(compare("bfloat16", far, plain, exact))
    worst = merge((compare("bfloat16", near, plain, exact), compare("bfloat16", far, plain, exact)))
    assert worst.control_ratio == pytest.approx(2.5, rel=1e-3)


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
