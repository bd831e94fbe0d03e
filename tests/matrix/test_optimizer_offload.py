"""Optimizer states and step on the host (`--optimizer-cpu-offload`): Megatron's
HybridDeviceOptimizer, which copies gradients to the host in its step, and parameters back.

On this machine all is on the host, and the optimizer asks tensors whether they are on a GPU. A
stand-in answers, while it divides parameters: all are, but for the copies that it makes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from support.layout import Layout, use_layout
from support.parity import Case, compare_one
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run

LAYOUT = Layout(ep=2, dp=4)
ADAM = {"optimizer": "adam", "adam_eps": 1.0, "lr": 0.01}  # eps keeps the gradient's scale


class HostTensor(torch.Tensor):
    """STAND-IN for what was copied off a GPU; what is made of it is on the host too."""

    is_cuda = False


@contextmanager
def others_on_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.Tensor, "cpu", lambda each: each.clone().as_subclass(HostTensor))
        patch.setattr(torch.Tensor, "pin_memory", lambda each: each)
        yield


@pytest.fixture
def offloaded(monkeypatch) -> list[tuple[int, int]]:
    """How many parameters each optimizer put on the host, and how many it has."""
    counts: list[tuple[int, int]] = []
    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def divide_and_note(optimizer: HybridDeviceOptimizer, fraction: float) -> Any:
        with others_on_a_gpu():
            groups = divide(optimizer, fraction)
        of_host, of_gpu = (sum(len(group["params"]) for group in each) for each in groups[:2])
        counts.append((of_host, of_host + of_gpu))
        return groups

    monkeypatch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", divide_and_note)
    return counts


def keep_nothing_in_fp32(chunks: Chunks) -> None:
    """As Megatron's Float16Module does: the optimizer takes no parameters in fp32."""
    for chunk in chunks:
        chunk.bfloat16()


def make_case(fraction: float) -> Case:
    def make_run(dtype: torch.dtype, **settings: Any) -> Run:
        config = {"params_dtype": dtype, "pipeline_dtype": dtype}
        return Run(
            layout=LAYOUT,
            routing=Routing("hot"),
            micro_batches=8,
            config=config | {"bf16": dtype == torch.bfloat16},
            ddp={
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
                "bucket_size": 5000,
            },
            **settings,
        )

    offload = {
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "use_precision_aware_optimizer": True,  # which Megatron demands
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }
    run = make_run(torch.bfloat16, optimizer=ADAM | offload, prepare=keep_nothing_in_fp32)
    exact = make_run(torch.float32, optimizer=ADAM)
    return Case(run, loss_tolerance=5e-3, gradient_tolerance=2e-2, exact=exact)


def test_a_step_on_the_host(offloaded):
    def work(rank: int, size: int) -> list[tuple[int, int]]:
        with use_layout(LAYOUT):
            for fraction in (1.0, 0.5):
                compare_one(make_case(fraction))
        return offloaded

    for counts in run_ranks(work, LAYOUT.world_size):
        assert counts
        whole, half = counts[: len(counts) // 2], counts[len(counts) // 2 :]
        assert all(on_host == every for on_host, every in whole)
        assert all(0 < on_host < every for on_host, every in half)
