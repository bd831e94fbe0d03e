"""Replica scheduling: every token once, at the least possible load, in its source's row first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_routings import KINDS, REPRODUCIBLE, make_counts

from megatron_llep.offline.lp import lp_quota
from megatron_llep.planner import (
    PLANNERS,
    Plan,
    imbalance_of,
    load_per_rank,
    plan_over_replicas,
    receives,
    sends,
)
from megatron_llep.planner.cost.model import LayerCost, LayerShape
from megatron_llep.planner.cost.presets import PRESETS
from megatron_llep.planner.replicas import spread_over_replicas, stay_in_row


@st.composite
def grids(draw) -> tuple[np.ndarray, int, int]:
    """Counts [R, E], D replicas and D * P ranks; each row has a routing of its own."""
    D, P, M, tp = (draw(st.integers(1, most)) for most in (4, 5, 4, 2))
    kinds = [draw(st.sampled_from(KINDS)) for _ in range(D)]
    seed = draw(st.integers(0, 10_000))
    rows = [make_counts(kind, P, M, seed + d, tp) for d, kind in enumerate(kinds)]
    return np.concatenate(rows).astype(np.int64), D, D * P


def get_holders(D: int, P: int, E: int) -> np.ndarray:
    """Bool [E, D * P]: expert e is on rank e // M of every row."""
    return np.tile(np.arange(E)[:, None] // (E // P) == np.arange(P), (1, D))


def make_joint_plan(
    counts: np.ndarray, D: int, num_ranks: int, planner: str, imbalance_threshold: float = 1.0
) -> tuple[Plan, np.ndarray]:
    cost = None
    if planner == "auto":
        shape = LayerShape(hidden=16, ffn_hidden=16, num_experts=counts.shape[1], top_k=1)
        cost = LayerCost(model=PRESETS["h100"], shape=shape)
    return plan_over_replicas(
        counts,
        num_replicas=D,
        num_ranks=num_ranks,
        planner=planner,
        imbalance_threshold=imbalance_threshold,
        cost=cost,
    )


def get_load(spread: np.ndarray, num_ranks: int) -> np.ndarray:
    return spread.sum(axis=0).reshape(num_ranks, -1).sum(axis=1)


@REPRODUCIBLE
@given(grids(), st.booleans())
def test_every_token_goes_to_one_replica_and_the_load_is_least(grid, lends):
    counts, D, num_ranks = grid
    R, E = counts.shape
    spread = spread_over_replicas(counts, D, num_ranks, lends=lends)
    assert (spread >= 0).all()
    assert np.array_equal(spread.reshape(R, D, E).sum(axis=1), counts)
    optimum = lp_quota(counts.sum(axis=0), get_holders(D, num_ranks // D, E)).sum(axis=0)
    assert get_load(spread, num_ranks).max() == optimum.max()


@REPRODUCIBLE
@given(grids(), st.booleans())
def test_only_surplus_leaves_its_row(grid, lends):
    counts, D, num_ranks = grid
    R, E = counts.shape
    before = load_per_rank(counts, D, num_ranks)
    spread = spread_over_replicas(counts, D, num_ranks, lends=lends)
    after = get_load(spread, num_ranks)
    row_of_source = np.arange(R) // (R // D)
    moved = counts.sum() - spread.reshape(R, D, E)[np.arange(R), row_of_source].sum()
    assert moved == np.maximum(before - after, 0).sum()  # nobody both gives and takes
    if not lends:
        assert (after[after < before] == after.max()).all()  # and nobody gives needlessly


@REPRODUCIBLE
@given(grids())
def test_a_ranks_own_tokens_leave_last(grid):
    counts, D, num_ranks = grid
    R, E = counts.shape
    P, tp = num_ranks // D, R // num_ranks
    spread = spread_over_replicas(counts, D, num_ranks, lends=True)
    for rank in range(num_ranks):
        d, p = divmod(rank, P)
        own = slice(rank * tp, (rank + 1) * tp)
        native = spread[:, (d * P + p) * (E // P) : (d * P + p + 1) * (E // P)]
        kept_own = native[own].sum()
        had_own = counts[own, p * (E // P) : (p + 1) * (E // P)].sum()
        row = slice(d * P * tp, (d + 1) * P * tp)
        others_kept = native[row].sum() - kept_own
        assert kept_own == had_own or others_kept == 0


@REPRODUCIBLE
@given(grids(), st.sampled_from(PLANNERS))
def test_plans_are_valid_and_never_worse_than_plain(grid, planner):
    counts, D, num_ranks = grid
    E = counts.shape[1]
    plan, spread = make_joint_plan(counts, D, num_ranks, planner)
    by_rank = spread.reshape(num_ranks, -1, D * E).sum(axis=1)
    plan.validate(by_rank, plan.experts_per_rank)
    plain = load_per_rank(counts, D, num_ranks)
    assert plan.imbalance_after <= imbalance_of(plain.tolist())
    if planner == "lp":
        assert plan.is_fallback
        return
    if planner == "exact":
        total = int(counts.sum())
        assert plan.load_per_rank_after.max() == -(-total // num_ranks)
    # No rank borrows an expert that it holds a replica of.
    _, home, borrower = plan.transfers.T
    assert (home % (num_ranks // D) != borrower % (num_ranks // D)).all()


@settings(REPRODUCIBLE, max_examples=100)
@given(grids())
def test_sources_and_ranks_agree_on_what_is_sent(grid):
    counts, D, num_ranks = grid
    plan, spread = make_joint_plan(counts, D, num_ranks, "exact")
    sent = np.stack([sends(plan, spread, source) for source in range(len(counts))])
    assert np.array_equal(sent.sum(axis=0), plan.quota)
    assert np.array_equal(sent.sum(axis=2), spread)
    for rank in range(num_ranks):
        got = receives(plan, spread, rank).sum(axis=1)
        assert np.array_equal(got, sent[:, :, rank].sum(axis=1))


def test_a_worked_example():
    # Two replicas of four experts on two ranks a row: 60 tokens on rank 0 of row 0, 20 elsewhere.
    counts = np.array([[30, 0, 0, 0], [20, 10, 10, 10], [5, 5, 5, 5], [5, 5, 5, 5]])
    assert load_per_rank(counts, 2, 4).tolist() == [60, 20, 20, 20]
    spread = spread_over_replicas(counts, 2, 4, lends=False)
    assert get_load(spread, 4).tolist() == [40, 20, 40, 20]
    # 20 tokens leave for row 1: those of source 1, as source 0 is the rank itself.
    assert spread[0].tolist() == [30, 0, 0, 0, 0, 0, 0, 0]
    assert spread[1].tolist() == [0, 10, 10, 10, 20, 0, 0, 0]
    plan, _ = make_joint_plan(counts, 2, 4, "exact")
    assert plan.load_per_rank_after.tolist() == [30] * 4


@pytest.mark.parametrize("planner", PLANNERS)
def test_below_the_threshold_plain_expert_parallelism_runs(planner):
    counts = np.array([[6, 4], [6, 4], [5, 5], [5, 5]])
    plan, spread = make_joint_plan(counts, 2, 4, planner, imbalance_threshold=1.3)
    assert plan.is_fallback
    assert np.array_equal(spread, stay_in_row(counts, 2))
    assert plan.load_per_rank_after.tolist() == [12, 8, 10, 10]


def test_one_replica_leaves_the_counts_alone():
    counts = np.array([[6, 0], [6, 0]])
    plan, spread = make_joint_plan(counts, 1, 2, "exact")
    assert spread is counts
    assert plan.imbalance_after == 1
