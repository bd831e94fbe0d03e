"""Layers whose activations Transformer Engine offloads (`--cpu-offloading-num-layers`).

TE's own code decides, copies and brings back, all on the CPU. A stand-in lets it take tensors that
are small, or not on a GPU.
"""

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

from megatron.core.extensions.transformer_engine import TEGroupedLinear
from te_experts import TE_CONFIG, use_te_experts
from test_te_training import KEEP, OVERLAP, REFETCH
from transformer_engine.pytorch.cpu_offload import OffloadableLayerState

from megatron_llep.experts.te_grouped import LendableTEGroupedMLP
from support.layout import Layout, use_layout
from support.parity import Case, compare_one
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run

pytestmark = pytest.mark.te

LAYOUT = Layout(ep=2, dp=4)


def admit_local_layers(chunks: Chunks) -> None:
    """Megatron offloads for TE's layers alone, and asks others whether it does."""
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "config"):
                module.config._cpu_offloading_context = None


def fuse_experts(chunks: Chunks) -> None:
    """As --gradient-accumulation-fusion, which local layers do not survive."""
    admit_local_layers(chunks)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TEGroupedLinear):
                module.fuse_wgrad_accumulation = True


@pytest.fixture
def offloaded(monkeypatch) -> dict[str, int]:
    """How many saved tensors are offloaded, and how many are lent weights, which are not."""
    lent: list[torch.UntypedStorage] = []  # held, so that no other storage has its address
    counts = {"offloaded": 0, "lent": 0}
    compute = LendableTEGroupedMLP.compute_foreign

    def compute_and_note(self, hidden, probs, tokens, foreign):
        lent.extend({each.untyped_storage() for weights in foreign for each in weights})
        return compute(self, hidden, probs, tokens, foreign)

    def is_offloaded(state: OffloadableLayerState, tensor: torch.Tensor) -> bool:
        is_lent = tensor.untyped_storage()._cdata in {each._cdata for each in lent}
        is_marked = getattr(tensor, "_TE_do_not_offload", False)
        if isinstance(tensor, torch.nn.Parameter) or is_marked or not tensor.is_contiguous():
            counts["lent"] += is_lent
            return False
        assert not is_lent, "a lent weight would be offloaded"
        counts["offloaded"] += 1
        return True

    monkeypatch.setattr(LendableTEGroupedMLP, "compute_foreign", compute_and_note)
    monkeypatch.setattr(OffloadableLayerState, "_check_if_offload", is_offloaded)
    return counts


def test_lent_weights_stay(offloaded):
    config = {"num_layers": 3, "cpu_offloading": True, "cpu_offloading_num_layers": 2}

    def work(rank: int, size: int) -> dict[str, int]:
        with use_layout(LAYOUT):
            for llep, prepare in ((KEEP, admit_local_layers), (REFETCH, fuse_experts)):
                run = Run(
                    layout=LAYOUT,
                    routing=Routing("hot"),
                    spec=use_te_experts,
                    micro_batches=8,
                    config=TE_CONFIG | config,
                    ddp=OVERLAP,
                    prepare=prepare,
                )
                compare_one(Case(run, llep))
        return offloaded

    counts = run_ranks(work, LAYOUT.world_size, timeout=120)
    assert all(each["offloaded"] > 0 for each in counts)
    assert sum(each["lent"] for each in counts) > 0
