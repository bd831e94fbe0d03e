"""Workloads: pure in seed, step and rank, feasible for distinct choices, shaped as said."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_llep.offline.workloads import (
    PAPER_GRID,
    WORKLOADS,
    make_counts,
    rank_counts,
    route_tokens,
)

REPRODUCIBLE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)
SIZES = {"num_ranks": 8, "num_experts": 64, "tokens_per_rank": 500, "top_k": 4}
RANDOM = [n for n, w in WORKLOADS.items() if w.noisy or w.count_tokens]


def rank_loads(counts):
    return counts.sum(axis=0).reshape(len(counts), -1).sum(axis=1)


@REPRODUCIBLE
@given(
    name=st.sampled_from(sorted(WORKLOADS)),
    P=st.sampled_from([1, 2, 4, 8]),
    M=st.sampled_from([17, 20, 32]),
    T=st.sampled_from([0, 1, 7, 300]),
    K=st.sampled_from([1, 2, 8, 17]),
    seed=st.integers(0, 5),
    step=st.integers(0, 9),
)
def test_choices_are_distinct_and_have_the_counts(name, P, M, T, K, seed, step):
    sizes = {"num_ranks": P, "num_experts": P * M, "tokens_per_rank": T, "top_k": K}
    when = {"seed": seed, "step": step}
    counts = make_counts(name, **sizes, **when)
    assert counts.shape == (P, P * M)
    assert counts.dtype == np.int64
    for rank in (0, P - 1):
        row = rank_counts(name, rank=rank, **sizes, **when)
        np.testing.assert_array_equal(row, counts[rank])
        choice = route_tokens(name, rank=rank, **sizes, **when)
        assert len(choice) <= T
        assert choice.shape == (len(choice), K)
        if WORKLOADS[name].count_tokens is None:
            assert len(choice) == T
        np.testing.assert_array_equal(np.bincount(choice.ravel(), minlength=P * M), row)
        ordered = np.sort(choice, axis=1)
        assert (ordered[:, 1:] > ordered[:, :-1]).all()


@pytest.mark.parametrize("name", WORKLOADS)
def test_same_arguments_same_counts(name):
    for _ in range(2):
        np.testing.assert_array_equal(
            make_counts(name, **SIZES, seed=3, step=7), make_counts(name, **SIZES, seed=3, step=7)
        )


@pytest.mark.parametrize("name", RANDOM)
def test_seed_and_rank_are_in_the_seed(name):
    counts = make_counts(name, **SIZES)
    assert not np.array_equal(counts, make_counts(name, **SIZES, seed=1))
    assert len(np.unique(counts, axis=0)) > 3
    # Numpy pads seeds with zeros: (seed) and (seed, step 0, rank 0) must not be the same stream.
    assert not np.array_equal(counts[0], counts[1])


def test_ranks_share_what_is_popular():
    counts = make_counts("lognormal-2", **SIZES)
    hottest = counts.sum(axis=0).argmax()
    assert (counts[:, hottest] >= 0.9 * counts.max(axis=1)).all()


def test_balanced_is_balanced():
    counts = make_counts("balanced", **SIZES)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", PAPER_GRID)
def test_paper_grid(name):
    _, percent, hot = name.split("-")
    share, H = int(percent) / 100, int(hot)
    # top_k=1, as in the published benchmark: the share of all pairs, evenly over experts 0 .. H-1.
    sizes = SIZES | {"top_k": 1, "tokens_per_rank": 2000}
    counts = make_counts(name, **sizes)
    assert abs(counts[:, :H].sum(axis=1) - share * 2000).max() <= H
    assert np.ptp(counts[:, :H]) <= 1
    assert np.ptp(counts[:, H:]) <= 1
    # top_k=4: the same of the pairs, as far as different experts allow.
    counts = make_counts(name, **SIZES)
    expected = share * 500 * min(H, 4)
    assert abs(counts[:, :H].sum(axis=1) - expected).max() <= H


def test_hot_rank_and_hot_spread():
    loads = rank_loads(make_counts("hot-rank", **SIZES, seed=1))
    assert loads.max() / loads.sum() == pytest.approx(0.5 + 0.5 / 8, abs=0.01)
    counts = make_counts("hot-spread", **SIZES | {"top_k": 1})
    hot = np.sort(np.argsort(counts.sum(axis=0))[-4:])
    assert len(set((hot // 8).tolist())) == 4
    assert counts[:, hot].sum() / counts.sum() == pytest.approx(0.5, abs=0.01)


def test_zipf_and_lognormal_are_as_skewed_as_they_say():
    sizes = SIZES | {"tokens_per_rank": 50_000, "top_k": 1}
    loads = np.sort(make_counts("zipf", **sizes).sum(axis=0))[::-1]
    np.testing.assert_allclose(loads[0] / loads[[1, 3, 9]], [2, 4, 10], rtol=0.05)
    for name, sigma in (("lognormal-1", 1), ("lognormal-2", 2)):
        logs = [
            np.log(np.maximum(make_counts(name, **sizes, seed=seed).sum(axis=0), 1)).std()
            for seed in range(8)
        ]
        assert np.mean(logs) == pytest.approx(sigma, rel=0.1)


def test_experts_and_ranks_without_tokens():
    assert (make_counts("idle-experts", **SIZES).sum(axis=0) == 0).sum() == 32
    tokens = make_counts("idle-ranks", **SIZES).sum(axis=1)
    assert tokens.tolist() == [2000, 0] * 4
    tokens = make_counts("ragged", **SIZES).sum(axis=1)
    assert len(set(tokens.tolist())) == 8
    assert (tokens % 4 == 0).all()


def test_hot_spot_rotates_and_bursts():
    hottest = [rank_loads(make_counts("rotating", **SIZES, step=s)).argmax() for s in range(9)]
    assert [(h - hottest[0]) % 8 for h in hottest] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    bursts = [np.ptp(rank_loads(make_counts("burst", **SIZES, step=s))) > 100 for s in range(16)]
    assert bursts == ([False] * 7 + [True]) * 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hottest", {}, "'hottest' is unknown: choose one of balanced"),
        ("balanced", {"num_experts": 63}, "63 experts do not divide over 8 ranks"),
        ("balanced", {"num_ranks": 0}, "do not divide over 0 ranks"),
        ("balanced", {"top_k": 65}, "top_k=65 must lie in 1 .. 64"),
        ("balanced", {"top_k": 0}, "top_k=0"),
        ("balanced", {"tokens_per_rank": -1}, "tokens_per_rank=-1"),
        ("balanced", {"seed": -1}, "seed=-1"),
        ("hot-50-16", {"num_experts": 16}, "16 hot experts of 16"),
    ],
)
def test_errors_say_what_is_wrong(name, change, message):
    with pytest.raises(ValueError, match=message):
        make_counts(name, **SIZES | change)


def test_rank_out_of_range():
    with pytest.raises(ValueError, match=r"rank=8 must lie in 0 \.\. 7"):
        rank_counts("balanced", **SIZES, rank=8)


def test_importing_the_workloads_leaves_torch_alone():
    code = "import sys, megatron_llep.offline.workloads; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "False"
