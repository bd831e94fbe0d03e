"""Placement of replicas by loads, against cases worked by hand and its own promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llep.offline.simulator.eplb import place_replicas, spread_evenly


def test_worked_by_hand():
    # Two ranks of three slots for four experts: the two spare slots go to expert 0, first for its
    # 12 tokens, then for its 6 a replica. Replicas: 4 4 4 (expert 0), 5 (expert 1), 1, 1.
    # Heaviest first: 5 -> rank 0; 4 -> rank 1; 4 -> rank 1 (4 < 5); 4 -> rank 0; then rank 1 (8)
    # takes a 1, and rank 0 (9) has the last slot.
    placed = place_replicas(np.array([12, 5, 1, 1]), 2, 3)
    assert placed.tolist() == [[1, 2], [1, 0], [0, 1], [1, 0]]
    quota = spread_evenly(np.array([12, 5, 1, 1]), placed)
    assert quota.tolist() == [[4, 8], [5, 0], [0, 1], [1, 0]]


def test_no_spare_slots_only_packs():
    placed = place_replicas(np.array([8, 7, 2, 1]), 2, 2)
    assert placed.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]


def test_too_few_slots():
    with pytest.raises(ValueError, match="1 slots on each of 2 ranks cannot hold 4 experts"):
        place_replicas(np.ones(4), 2, 1)


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(P=st.integers(1, 12), M=st.integers(1, 6), spare=st.integers(0, 3), seed=st.integers(0, 999))
def test_slots_are_full_and_tokens_all_there(P, M, spare, seed):
    rng = np.random.default_rng(seed)
    loads = (100 * rng.lognormal(sigma=2, size=P * M)).astype(np.int64)
    placed = place_replicas(loads, P, M + spare)
    assert (placed.sum(axis=0) == M + spare).all()
    assert (placed.sum(axis=1) >= 1).all()
    quota = spread_evenly(loads, placed)
    assert (quota >= 0).all()
    assert (quota[placed == 0] == 0).all()
    np.testing.assert_array_equal(quota.sum(axis=1), loads)
    per_replica = quota / np.maximum(placed, 1)
    for expert in range(P * M):
        assert np.ptp(per_replica[expert][placed[expert] > 0]) <= 1
    # The heaviest replica could not be lighter: every expert with more per replica has another.
    most = loads / placed.sum(axis=1)
    if spare:
        split = placed.sum(axis=1) > 1
        before_last = np.where(split, loads / np.maximum(placed.sum(axis=1) - 1, 1), np.inf)
        assert most.max() <= before_last.min()
