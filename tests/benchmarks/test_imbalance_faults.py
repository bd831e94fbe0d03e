"""The imbalance benchmark on real ranks: right layers pass in every mode, wrong ones do not.

Letters: T tokens of a rank, E experts.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_llep.config import LLEPConfig
from support.layout import Layout, use_layout
from support.ranks import RankError, run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.imbalance.data import LayerSizes, make_step
from benchmarks.imbalance.layer import PlacedMoELayer, build_layer
from benchmarks.imbalance.methods import build_subject, place_by_history
from benchmarks.imbalance.modes import MODES, MOMENTUM, choose_rate
from benchmarks.imbalance.names import DISPATCH, TRAIN
from benchmarks.imbalance.reference import Reference
from benchmarks.imbalance.workloads import route

SIZES = LayerSizes(num_ranks=2, num_experts=8, top_k=2, tokens=24, hidden=16, ffn=24)
LLEP = LLEPConfig(planner="exact", min_tokens_per_gemm=1)


class OneTokenAstray(MoELayer):
    """Its first token goes to another expert than the router chose."""

    def route(self, hidden_states, padding_mask=None):
        probs, chosen = super().route(hidden_states, padding_mask)
        order = torch.arange(chosen.shape[1])
        was = int(chosen[0].nonzero()[0])
        free = int((~chosen[0]).nonzero()[0])
        order[[was, free]] = order[[free, was]]
        probs, chosen = probs.clone(), chosen.clone()
        probs[0], chosen[0] = probs[0, order], chosen[0, order]
        return probs, chosen


class WrongWeight(MoELayer):
    """The weights of its pairs are one part in 10,000 off."""

    def route(self, hidden_states, padding_mask=None):
        probs, chosen = super().route(hidden_states, padding_mask)
        return probs * 1.0001, chosen


class LostGradients(PlacedMoELayer):
    """Gradients of replicas stay where they are."""

    def add_up_replicas(self, name):
        return


class TakenForAnother(PlacedMoELayer):
    """It takes two slots for each other's experts."""

    def place(self, slots):
        wrong = slots.copy()
        wrong[[0, -1]] = wrong[[-1, 0]]
        super().place(wrong)


def check(
    rank: int,
    method: str,
    mode: str,
    kind: type | None,
    workload: str = "W2",
    sizes: LayerSizes = SIZES,
) -> float:
    """Two steps of a method, in a layer of some kind."""
    with use_layout(Layout(ep=2)):

        def build(sizes, seed, slots):
            layer = build_layer(sizes, seed, slots)
            if kind is TakenForAnother:
                layer.__class__ = kind
                layer.place(slots)
            elif kind is not None:
                layer.__class__ = kind
            return layer

        history = [route(workload, sizes, step=step) for step in range(2)]
        llep = LLEP if method == "exact" else None
        subject = build_subject(method, sizes, 0, history=history, llep=llep, build=build)
        run = MODES[mode](subject, 0)
        reference = Reference(sizes, 0, "cpu")
        worst = 0.0
        for step in (2, 3):
            routing = route(workload, sizes, step=step)
            data = make_step(routing, sizes.hidden, rank, seed=0, step=step, device="cpu")
            expected = None if mode == DISPATCH else reference.run(data)
            if mode == TRAIN:
                mean = {name: each / 2 for name, each in expected.gradients.items()}
                reference.descend(mean, choose_rate(sizes), MOMENTUM)
            _, off_by = run.check(data, expected)
            worst = max(worst, off_by)
            run.compare_weights(reference, step - 1)
        if method == "exact" and workload != "W4":  # which is even
            assert len(subject.plan.transfers)
        if method == "eplb+replicas":
            assert subject.placed_experts() > 0
        return worst


def test_every_method_in_every_mode():
    def work(rank, size):
        return [
            check(rank, method, mode, None, workload)
            for mode in MODES
            for method in ("plain", "exact", "eplb", "eplb+replicas")
            for workload in ("W2", "W4")
        ]

    for found in run_ranks(work, 2, timeout=120):
        assert all(0 < each < 2e-5 for each in found)


def test_one_expert_a_token():
    """Its weight is 1, and the router's gradient 0."""
    sizes = dataclasses.replace(SIZES, top_k=1)

    def work(rank, size):
        return check(rank, "exact", "layer", None, "W2", sizes)

    assert all(0 < each < 2e-5 for each in run_ranks(work, 2))


@pytest.mark.parametrize(
    ("method", "mode", "kind", "said"),
    [
        ("plain", "layer", OneTokenAstray, "no token chose so"),
        ("plain", "train", WrongWeight, "another weight"),
        ("eplb+replicas", "layer", LostGradients, "gradient of expert"),
        ("eplb", "layer", TakenForAnother, "no token chose so"),
        ("eplb", "dispatch", TakenForAnother, "no token chose so"),
    ],
)
def test_wrong_layers_are_found(method, mode, kind, said):
    with pytest.raises(RankError, match=f"OracleError: .*{said}"):
        run_ranks(lambda rank, size: check(rank, method, mode, kind, "W1"), 2, timeout=60)


def test_placement_has_what_is_hot_twice():
    history = [route("W1", SIZES, step=step) for step in range(3)]
    moved = place_by_history(history, SIZES, 0)
    assert sorted(moved.tolist()) == list(range(8))
    hot = {0, 1}
    assert set(moved[:4].tolist()) & hot, "a hot expert on each rank"
    assert set(moved[4:].tolist()) & hot
    replicated = place_by_history(history, SIZES, 1)
    values, times = np.unique(replicated, return_counts=True)
    assert values.tolist() == list(range(8))
    assert set(values[times > 1].tolist()) == hot
