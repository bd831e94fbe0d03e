"""First-fit, against its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.training.sft.packing import first_fit, pack_epoch

CAPACITY = 32
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


def first_fit_by_definition(lengths, capacity):
    packs, room = [], []
    for item, length in enumerate(lengths):
        pack = next((pack for pack, left in enumerate(room) if length <= left), len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(capacity)
        packs[pack].append(item)
        room[pack] -= length
    return packs


@given(LENGTHS)
def test_it_is_first_fit(lengths):
    assert first_fit(lengths, CAPACITY) == first_fit_by_definition(lengths, CAPACITY)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="length 33 does not fit a pack of 32"):
        first_fit([3, 33], CAPACITY)


@given(LENGTHS.filter(len), st.integers(0, 5))
def test_an_epoch_has_every_item_once_and_no_pack_overflows(lengths, epoch):
    lengths = np.array(lengths)
    packs = pack_epoch(lengths, CAPACITY, seed=1, epoch=epoch)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(lengths[pack].sum() <= CAPACITY for pack in packs)
    assert packs == pack_epoch(lengths, CAPACITY, seed=1, epoch=epoch)


def test_epochs_and_seeds_differ():
    lengths = np.full(40, 8)
    packs = [
        pack_epoch(lengths, CAPACITY, seed=seed, epoch=epoch)
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert packs[0] != packs[1]
    assert packs[0] != packs[2]
