"""The oracle of the imbalance benchmark: what is right passes, and each fault is found.

Letters: P ranks, E experts, M = E / P.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.imbalance.data import LayerSizes, make_expert, make_router, make_step
from benchmarks.imbalance.memory import LiveBytes
from benchmarks.imbalance.oracle import (
    OracleError,
    Record,
    check_numbers,
    check_pairs,
    count_crossing,
)
from benchmarks.imbalance.reference import Reference
from benchmarks.imbalance.workloads import route

SIZES = LayerSizes(num_ranks=2, num_experts=8, top_k=2, tokens=12, hidden=8, ffn=6)
ROUTING = route("W1", SIZES)
P, E, M = 2, 8, 4
WEIGHTS = np.random.default_rng(0).random(ROUTING.experts.shape)


def compute_at_home() -> list[Record]:
    """What plain expert parallelism does, in some order."""
    token = np.repeat(np.arange(len(ROUTING.experts)), 2)
    expert, weight = ROUTING.experts.ravel(), WEIGHTS.ravel()
    order = np.random.default_rng(1).permutation(len(token))
    token, expert, weight = token[order], expert[order], weight[order]
    return [
        Record(token=token[at], expert=expert[at], weight=weight[at])
        for at in (expert // M == rank for rank in range(P))
    ]


def quota() -> np.ndarray:
    found = np.zeros((E, P), dtype=int)
    found[np.arange(E), np.arange(E) // M] = ROUTING.counts.sum(axis=0)
    return found


def check(records: list[Record], **changed) -> None:
    check_pairs(records, ROUTING, **{"weights": WEIGHTS, "quota": quota()} | changed)


def test_what_is_right_passes():
    records = compute_at_home()
    check(records)
    assert count_crossing(records, ROUTING) == ROUTING.counts[0, M:].sum() + (
        ROUTING.counts[1, :M].sum()
    )


def _lose(records):
    first = records[0]
    records[0] = Record(**{name: array[1:] for name, array in vars(first).items()})


def _send_twice(records):
    first = records[0]
    records[0] = Record(
        **{name: np.concatenate((array, array[:1])) for name, array in vars(first).items()}
    )


def _mistake_expert(records):
    expert = records[0].expert.copy()
    token = records[0].token[0]
    expert[0] = next(e for e in range(E) if e not in ROUTING.experts[token])
    records[0] = dataclasses.replace(records[0], expert=expert)


def _mistake_token(records):
    token = records[1].token.copy()
    token[0] = -1
    records[1] = dataclasses.replace(records[1], token=token)


def _swap_weights(records):
    weight = records[1].weight.copy()
    weight[:2] = weight[1::-1]
    records[1] = dataclasses.replace(records[1], weight=weight)


def _compute_elsewhere(records):
    arrays = [vars(each) for each in records]
    moved = {name: arrays[0][name][:1] for name in arrays[0]}
    records[0] = Record(**{name: array[1:] for name, array in arrays[0].items()})
    records[1] = Record(
        **{name: np.concatenate((array, moved[name])) for name, array in arrays[1].items()}
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_lose, "not computed"),
        (_send_twice, "more than once"),
        (_mistake_expert, "no token chose so"),
        (_mistake_token, "no token chose so.*rank 1"),
        (_swap_weights, "2 pairs .* another weight"),
        (_compute_elsewhere, "rank 0 computed"),
    ],
)
def test_faults_are_found(spoil, said):
    records = compute_at_home()
    spoil(records)
    with pytest.raises(OracleError, match=said):
        check(records)


def test_numbers():
    reference = {"output": np.array([1.0, -2.0]), "empty": np.zeros((0, 3))}
    assert check_numbers(reference, reference, tolerance=0) == 0
    near = {**reference, "output": np.array([1.0, -2.0001])}
    assert check_numbers(near, reference, tolerance=1e-4) == pytest.approx(5e-5)
    for wrong in (
        near,
        {**reference, "output": np.array([1.0, np.nan])},
        {**reference, "output": np.array([1.0])},
        {"output": reference["output"]},
    ):
        with pytest.raises(OracleError):
            check_numbers(wrong, reference, tolerance=1e-5)


def test_the_reference_is_the_formula():
    """Token by token, and its gradients by finite differences."""
    data = make_step(ROUTING, SIZES.hidden, 0, seed=0, step=0, device="cpu")
    reference = Reference(SIZES, 0, "cpu")
    found = reference.run(data)
    token = 5
    x = data.hidden[token].double()
    chosen = ROUTING.experts[token]
    weights = (make_router(SIZES, 0).double() @ x)[chosen].softmax(0)
    expected = torch.zeros_like(x)
    for expert, weight in zip(chosen.tolist(), weights, strict=True):
        first, second = (each.double() for each in make_expert(SIZES, expert, 0))
        gate, up = (first @ x).chunk(2)
        expected += weight * (second @ (gate * gate.sigmoid() * up))
    torch.testing.assert_close(found.output[token], expected)
    torch.testing.assert_close(found.weights[token], weights)

    def loss() -> float:
        return float((reference.run(data).output * data.gradient.double()).sum())

    for name in ("router", f"expert {chosen[0]} fc1", f"expert {chosen[0]} fc2"):
        weight, h = reference.parameters[name], 1e-6
        losses = []
        for change in (h, -2 * h):
            with torch.no_grad():
                weight[chosen[0] if name == "router" else 0, 0] += change
            losses.append(loss())
        with torch.no_grad():
            weight[chosen[0] if name == "router" else 0, 0] += h
        row = chosen[0] if name == "router" else 0
        slope = (losses[0] - losses[1]) / (2 * h)
        assert slope == pytest.approx(float(found.gradients[name][row, 0]), rel=1e-4, abs=1e-7)


def test_live_bytes():
    outside = torch.ones(1000)
    with LiveBytes() as live:
        kept = torch.ones(100)  # 400 bytes
        view = kept[10:].view(9, 10)
        assert live.alive() == 400
        gone = view @ torch.ones(10, 50)  # 2,000, and 1,800 of 450 numbers
        assert live.peak == 400 + 2000 + 1800
        gone.untyped_storage().resize_(0)
        outside += 1
        assert live.alive() == 400
        del kept
        assert live.alive() == 400  # the view holds it
        del view
        assert live.alive() == 0
    assert live.peak == 4200
