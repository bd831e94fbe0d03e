"""The workloads of the imbalance benchmark: each has the heat that it claims, and nothing else.

Letters: P ranks, E experts, M = E / P, K experts of a token.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.imbalance.workloads import (
    BURST_EVERY,
    HEAT,
    LONGEST_TO_SHORTEST,
    WORKLOADS,
    Routing,
    Sizes,
    route,
    route_evenly,
)

SIZES = Sizes(num_ranks=4, num_experts=32, top_k=2, tokens=96)


@st.composite
def some_sizes(draw) -> Sizes:
    P = draw(st.integers(2, 5))
    M = draw(st.integers(2, 6))
    K = draw(st.integers(1, max(1, (P - 1) * (M // 2))))
    return Sizes(
        num_ranks=P,
        num_experts=P * M,
        top_k=min(K, P * M // 2),
        tokens=draw(st.integers(LONGEST_TO_SHORTEST, 60)),
    )


def per_rank(routing: Routing) -> np.ndarray:
    """Pairs [P] that plain expert parallelism computes on each rank."""
    P = len(routing.tokens_per_rank)
    return routing.counts.sum(axis=0).reshape(P, -1).sum(axis=1)


def per_expert(name: str, sizes: Sizes = SIZES, **numbers: int) -> np.ndarray:
    return route(name, sizes, **numbers).counts.sum(axis=0)


@settings(max_examples=60, deadline=None)
@given(some_sizes(), st.sampled_from(list(WORKLOADS)), st.integers(0, 9), st.integers(0, 9))
def test_every_row_has_k_experts(sizes, name, seed, step):
    routing = route(name, sizes, seed=seed, step=step)
    even = route_evenly(routing, seed=seed, step=step)
    for each in (routing, even):
        P, E, K = sizes.num_ranks, sizes.num_experts, sizes.top_k
        assert each.experts.shape == (P * sizes.tokens, K)
        assert ((each.experts >= 0) & (each.experts < E)).all()
        assert all(len(set(row)) == K for row in each.experts.tolist())
        assert each.tokens_per_rank.sum() == P * sizes.tokens
        assert (each.tokens_per_rank >= 1).all()
        assert each.counts.sum() == each.experts.size
    np.testing.assert_array_equal(even.tokens_per_rank, routing.tokens_per_rank)
    assert np.ptp(even.counts.sum(axis=0)) <= 1


@pytest.mark.parametrize("name", WORKLOADS)
def test_seed_and_step_are_all_that_counts(name):
    first = route(name, SIZES, seed=3, step=2)
    assert route(name, SIZES, seed=3, step=2).digest == first.digest
    assert route(name, SIZES, seed=4, step=2).digest != first.digest
    assert route(name, SIZES, seed=3, step=3).digest != first.digest


@pytest.mark.parametrize("name", sorted(set(WORKLOADS) - {"W4"}))
def test_every_rank_sends_the_same(name):
    counts = route(name, SIZES).counts
    assert np.ptp(counts, axis=0).max() <= 2
    assert set(route(name, SIZES).tokens_per_rank) == {96}


def test_w0_is_balanced():
    assert np.ptp(per_expert("W0")) == 0


def test_w1_heats_experts_side_by_side():
    loads = per_expert("W1")
    hot = np.flatnonzero(loads > loads.mean())
    assert hot.tolist() == list(range(8))
    assert loads[hot].sum() == pytest.approx(HEAT * loads.sum(), abs=1)
    assert np.ptp(loads[hot]) <= 1


def test_w2_heats_one_rank():
    hot = set()
    for seed in range(8):
        routing = route("W2", SIZES, seed=seed)
        ranks = per_rank(routing)
        assert ranks.max() == pytest.approx(HEAT * ranks.sum(), abs=8)
        hot.add(int(ranks.argmax()))
        of_hot = routing.counts.sum(axis=0).reshape(4, 8)[ranks.argmax()]
        assert np.ptp(of_hot) <= 1
        assert per_rank(route("W2", SIZES, seed=seed, step=5)).argmax() == ranks.argmax()
    assert len(hot) > 1


def test_w3_has_the_heat_of_w1_elsewhere():
    loads = per_expert("W3")
    np.testing.assert_array_equal(np.sort(loads), np.sort(per_expert("W1")))
    per_rank_hot = (loads > loads.mean()).reshape(4, 8).sum(axis=1)
    assert per_rank_hot.tolist() == [2, 2, 2, 2]
    ranks = per_rank(route("W3", SIZES))
    assert ranks.max() <= 1.01 * ranks.mean()
    assert per_rank(route("W1", SIZES)).max() > 2.9 * ranks.mean()


def test_w4_differs_before_the_dispatch_alone():
    routing = route("W4", SIZES)
    tokens = routing.tokens_per_rank
    assert tokens.sum() == 4 * 96
    assert tokens.max() / tokens.min() == pytest.approx(LONGEST_TO_SHORTEST, rel=0.1)
    assert np.ptp(routing.counts.sum(axis=0)) == 0


def test_w5_leaves_experts_and_a_rank_empty():
    routing = route("W5", SIZES)
    loads = routing.counts.sum(axis=0)
    assert sorted(per_rank(routing))[0] == 0
    assert sorted(per_rank(routing))[1] > 0
    assert (loads == 0).sum() == 32 - 3 * 4
    assert np.ptp(loads[loads > 0]) <= 1


def test_w6_goes_on_by_one_rank():
    routings = [route("W6", SIZES, seed=1, step=step) for step in range(32)]
    hot = [int(per_rank(routing).argmax()) for routing in routings]
    assert all((b - a) % 4 == 1 for a, b in itertools.pairwise(hot))
    experts = [routing.counts.sum(axis=0) for routing in routings]
    assert len({int(loads.argmax()) for loads in experts}) == 32  # each once
    assert all(loads.max() == 4 * 96 for loads in experts)  # in every row
    one = dataclasses.replace(SIZES, top_k=1)
    assert per_expert("W6", one).max() == HEAT * 4 * 96


def test_w7_bursts():
    hot = []
    for step in range(8 * BURST_EVERY):
        loads = per_expert("W7", step=step)
        if step % BURST_EVERY == BURST_EVERY - 1:
            assert loads.max() == 4 * 96
            hot.append(int(loads.argmax()))
        else:
            assert np.ptp(loads) == 0
    assert len(set(hot)) == 8


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_ranks": 1}, "--ep 1"),
        ({"num_experts": 33}, "--experts 33"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_k": 17}, "--top-k 17"),
        ({"tokens": 3}, "--tokens 3"),
    ],
)
def test_sizes_that_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        Sizes(**{**vars(SIZES), **wrong})


def test_unknown_and_unfit():
    with pytest.raises(ValueError, match=r"--workloads W8: .*W7"):
        route("W8", SIZES)
    with pytest.raises(ValueError, match="--seed -1"):
        route("W0", SIZES, seed=-1)
    narrow = Sizes(num_ranks=2, num_experts=4, top_k=2, tokens=8)
    with pytest.raises(ValueError, match="W5"):
        route("W5", narrow)
