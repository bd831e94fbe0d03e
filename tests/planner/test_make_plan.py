"""Fall-back, immutability, bad arguments, and what importing the planner costs."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from planner_routings import lla_quota, make_counts

from megatron_llep.planner import make_plan, plan_from_quota


def test_falls_back_below_the_threshold_only():
    # Loads 13 | 7: imbalance 1.3, not below it.
    counts = np.array([[13, 7], [0, 0]])
    assert not make_plan(counts, imbalance_threshold=1.3).is_fallback
    plan = make_plan(counts, imbalance_threshold=1.31)
    assert plan.is_fallback
    assert plan.quota.tolist() == [[13, 0], [0, 7]]
    assert plan.transfers.shape == (0, 3)
    assert plan.foreign_experts.shape == (2, 0)
    assert plan.imbalance_before == plan.imbalance_after == 1.3


def test_falls_back_when_nothing_would_be_lent():
    balanced = np.full((4, 8), 5)
    assert make_plan(balanced, imbalance_threshold=0.0).is_fallback
    assert make_plan(np.zeros((4, 8), dtype=int), imbalance_threshold=0.0).is_fallback
    assert make_plan(make_counts("one_expert", 4, 2, 0), max_foreign=0).is_fallback
    assert make_plan(np.array([[3, 9]])).is_fallback


def test_falls_back_when_the_largest_load_would_not_fall():
    # Loads 0 | 3 | 3, capacity 2, one slot each: expert 1 spills a token to rank 0, whose slot is
    # then taken; expert 2 is to spill one too, but only rank 1 has a slot, and no room.
    loads = np.array([0, 3, 3])
    quota = lla_quota(loads, 3, 1, capacity_factor=1.0, min_tokens_per_gemm=1)
    assert quota.tolist() == [[0, 0, 0], [1, 2, 0], [0, 0, 3]]
    counts = np.vstack([loads, 0 * loads, 0 * loads])
    assert make_plan(counts, planner="lla", min_tokens_per_gemm=1).is_fallback
    assert not make_plan(counts, planner="exact").is_fallback


def test_plan_is_frozen():
    plan = make_plan(make_counts("one_expert", 4, 2, 0))
    assert not plan.is_fallback
    with pytest.raises(FrozenInstanceError):
        plan.is_fallback = True
    for array in (plan.quota, plan.foreign_experts, plan.transfers):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_counts_are_left_alone():
    counts = make_counts("lognormal", 4, 4, 0)
    before = counts.copy()
    make_plan(counts)
    np.testing.assert_array_equal(counts, before)
    assert counts.flags.writeable


GOOD = make_counts("lognormal", 4, 4, 0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (GOOD.astype(float), "integers"),
        (GOOD.astype(bool), "integers"),
        (GOOD - 10_000, "negative"),
        (GOOD[:3], "16 experts do not divide over 3 ranks"),
        (GOOD[0], r"\[P, E\]"),
        (GOOD[:0], "non-empty"),
    ],
)
def test_bad_counts(counts, message):
    with pytest.raises(ValueError, match=message):
        make_plan(counts)


@pytest.mark.parametrize(
    "option",
    [
        {"planner": "best"},
        {"max_foreign": -1},
        {"max_foreign": 5},
        {"capacity_factor": 0.99},
        {"capacity_factor": float("nan")},
        {"capacity_factor": float("inf")},
        {"min_tokens_per_gemm": -1},
        {"imbalance_threshold": -0.1},
        {"imbalance_threshold": float("nan")},
    ],
)
def test_bad_options_are_named(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        make_plan(GOOD, **option)


def broken(plan, **changes):
    return replace(plan, **{k: v(getattr(plan, k).copy()) for k, v in changes.items()})


def one_more(array):
    array[0, 0] += 1
    return array


def test_validate_names_what_is_broken():
    counts = make_counts("one_expert", 4, 2, 0)
    plan = make_plan(counts, planner="exact", max_foreign=1)
    plan.validate(counts, 1)
    hot = int(counts.sum(axis=0).argmax())

    def move_token(quota):
        quota[hot, 0] -= 1
        quota[hot, 1] += 1
        return quota

    def go_negative(quota):
        quota[(hot + 1) % 8] = [1, -1, 0, 0]
        return quota

    with pytest.raises(ValueError, match="do not sum"):
        broken(plan, quota=one_more).validate(counts, 1)
    with pytest.raises(ValueError, match="negative quota"):
        broken(plan, quota=go_negative).validate(counts, 1)
    with pytest.raises(ValueError, match="counts are"):
        plan.validate(counts[:, :4], 1)
    with pytest.raises(ValueError, match="more than 0 foreign"):
        plan.validate(counts, 0)
    with pytest.raises(ValueError, match="native expert"):
        broken(plan, foreign_experts=lambda a: np.arange(4)[:, None] * 2).validate(counts, 1)
    with pytest.raises(ValueError, match="foreign_experts do not follow"):
        broken(plan, foreign_experts=lambda a: np.full_like(a, -1)).validate(counts, 1)
    with pytest.raises(ValueError, match="transfers do not follow"):
        broken(plan, transfers=lambda a: a[:-1]).validate(counts, 1)
    with pytest.raises(ValueError, match="imbalance_after"):
        broken(plan, quota=move_token).validate(counts, 1)
    with pytest.raises(ValueError, match="is_fallback"):
        replace(plan, is_fallback=True).validate(counts, 1)


def test_sizes_and_slots_by_hand():
    quota = np.array([[4, 2, 3], [1, 0, 1], [0, 5, 0], [0, 0, 0], [0, 2, 6], [0, 0, 0]])
    plan = plan_from_quota(quota)
    assert (plan.num_ranks, plan.num_experts, plan.experts_per_rank) == (3, 6, 2)
    assert plan.max_foreign == 2
    assert plan.foreign_experts.tolist() == [[-1, -1], [0, 4], [0, 1]]
    assert plan.transfers.tolist() == [[0, 0, 1], [0, 0, 2], [1, 0, 2], [4, 2, 1]]
    assert plan.load_per_rank_before.tolist() == [11, 5, 8]
    assert plan.load_per_rank_after.tolist() == [5, 9, 10]
    assert plan.imbalance_before == 11 / 8
    assert plan.imbalance_after == 10 / 8


def test_importing_the_planner_leaves_torch_alone():
    code = "import sys, megatron_llep.planner; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "False"
