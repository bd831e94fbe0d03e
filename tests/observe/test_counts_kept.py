"""How many counts are kept, and which layer forwards are planned ahead."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.observe.counts import MOST_KEPT, KeptCounts
from megatron_llep.observe.outlook import NUM_ROWS, choose_evenly, summarise_outlook


@given(st.integers(0, 2000), st.integers(1, 64))
def test_chosen_evenly(number, most):
    chosen = choose_evenly(number, most)
    assert len(chosen) == min(number, most)
    assert chosen == sorted(set(chosen))
    assert all(0 <= each < number for each in chosen)
    gaps = np.diff([-1 - (chosen[0] if chosen else 0), *chosen])[1:]
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


@given(st.integers(1, 5 * MOST_KEPT))
def test_never_more_than_so_many_are_kept_and_they_are_evenly_spread(number):
    kept = KeptCounts()
    for micro_batch in range(number):
        kept.add(torch.tensor([micro_batch], dtype=torch.int32))
    assert len(kept.counts) <= MOST_KEPT
    assert [int(each) for each in kept.counts] == list(range(0, number, kept.stride))
    assert kept.stride == 1 or number > MOST_KEPT


def test_what_was_forgotten_stays_so_when_counts_are_dropped():
    kept = KeptCounts()
    for micro_batch in range(MOST_KEPT + 1):
        if micro_batch == 11:
            kept.forget()
        kept.add(torch.tensor([micro_batch], dtype=torch.int32))
    assert [int(each) for each in kept.counts[: kept.num_forgotten]] == [0, 2, 4, 6, 8, 10]


def test_an_outlook_of_nothing_says_nothing():
    assert summarise_outlook(np.zeros((NUM_ROWS, 3)), num_layers=3, other_seconds=1.0) == {}


def test_a_micro_batch_without_tokens_has_no_gain():
    table = np.zeros((NUM_ROWS, 1))
    table[0] = table[2] = table[4] = 1
    values = summarise_outlook(table, num_layers=1, other_seconds=1.0)
    assert values == {
        "outlook_planned": 1,
        "outlook_plain_imbalance": 1,
        "outlook_tolerant_imbalance": 1,
        "outlook_tolerant_lent_experts": 0,
    }


def test_sharers_are_not_copied_with_a_model():
    from megatron_llep.observe.counts import Sharers

    sharers = Sharers(group=object(), num_ranks=2, outlook=None)  # type: ignore[arg-type]
    assert copy.deepcopy([sharers])[0] is sharers
    with pytest.raises(AttributeError):
        sharers.num_ranks = 3  # type: ignore[misc]
