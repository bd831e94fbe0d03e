"""Experts whose activations are offloaded (`--fine-grained-activation-offloading`).

The copies are a stand-in, on the CPU: what a group saves is put aside, and what Megatron says it
may release is released.
"""

from typing import Any, ClassVar

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

pytest.importorskip("transformer_engine.pytorch")

from megatron.core.models.gpt import gpt_model
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.moe import experts
from te_experts import TE_CONFIG, use_te_experts
from test_te_training import FUSED, lend_only, recompute

from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_one
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run

pytestmark = pytest.mark.te

OFFLOAD = {
    "fine_grained_activation_offloading": True,
    "offload_modules": ["expert_fc1", "moe_act"],
    "min_offloaded_tensor_size": 0,
}


class StandInOffload:
    """Has the methods of Megatron's interface that a model without a GPU calls."""

    groups: ClassVar[list[list[str]]] = []
    """Of each micro-batch, in the order in which they start and end."""

    def __init__(self, offload: bool, tensor: torch.Tensor, name: str):
        self._offload, self._tensor, self._name = offload, tensor, name
        self._hooks = saved_tensors_hooks(_put_aside, lambda saved: saved)

    def __enter__(self) -> torch.Tensor:
        if self._offload:
            self.groups[-1].append(f"start {self._name}")
            self._hooks.__enter__()
        return self._tensor

    def __exit__(self, *error: Any) -> None:
        if self._offload:
            self._hooks.__exit__(*error)

    def group_offload(
        self, tensor: torch.Tensor, forced_released_tensors: Any = (), delay_offload: bool = False
    ) -> torch.Tensor:
        if self._offload:
            self.groups[-1].append(f"commit {self._name}")
            for released in forced_released_tensors:
                released.untyped_storage().resize_(0)
        return tensor

    @classmethod
    def init_chunk_handler(cls, **settings: Any) -> None:
        cls.groups.append([])

    @staticmethod
    def mark_not_offload(parameter: torch.Tensor) -> None: ...

    @staticmethod
    def reset() -> None: ...


def _put_aside(tensor: torch.Tensor) -> torch.Tensor:
    kept = isinstance(tensor, torch.nn.Parameter)
    return tensor if kept else tensor.detach().clone()


@pytest.mark.parametrize("config", [FUSED, recompute("moe_act")], ids=["fused", "recomputed"])
def test_every_forward_offloads_the_same_groups(config, monkeypatch):
    """Also where one micro-batch lends and the next does not: Megatron counts on it."""
    for module in (experts, gpt_model, schedules):
        monkeypatch.setattr(module, "off_interface", StandInOffload)
    run = Run(
        layout=Layout(ep=2),
        routing=Routing("hot"),
        spec=use_te_experts,
        micro_batches=8,
        prepare=lend_only(1, 2),
        config=TE_CONFIG | OFFLOAD | config,
    )

    def work(rank, size):
        compare_one(Case(run, EAGER))
        return StandInOffload.groups

    for groups in run_ranks(work, 2, timeout=120):
        names = ("expert_fc1", "moe_act")
        one_layer = [f"{what} {name}" for name in names for what in ("start", "commit")]
        assert len(groups) == 2 * 2 * 4, "plain and with LLEP, steps, micro-batches of a rank"
        assert all(of_forward == 2 * one_layer for of_forward in groups)
