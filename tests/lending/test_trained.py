"""What ranks tell each other beside their counts, and what follows for what travels."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llep.lending.parcel import ALIGNMENT, Parcel
from megatron_llep.lending.trained import find_common_dtype, find_trained, list_trained
from megatron_llep.placement.rank_note import DIGEST_BITS, MASK_BITS, Notes, RankNote

FEW = settings(max_examples=25, deadline=None, derandomize=True)

NOTES = st.builds(
    RankNote,
    trains=st.integers(0, 2**MASK_BITS - 1),
    lends=st.booleans(),
    refuses=st.booleans(),
    experts=st.integers(0, 2**DIGEST_BITS - 1),
)


@FEW
@given(st.lists(NOTES, min_size=1, max_size=5))
def test_notes_survive_the_way(notes):
    numbers = np.array([note.encode() for note in notes], dtype=np.int64)
    assert (numbers >= 0).all()
    decoded = Notes.decode(numbers)
    assert decoded.lends == all(note.lends for note in notes)
    assert [bool(each) for each in decoded.refuses] == [note.refuses for note in notes]
    assert decoded.experts.tolist() == [note.experts for note in notes]
    for bit in range(MASK_BITS):
        wanted = any(note.trains >> bit & 1 for note in notes)
        assert bool(decoded.trains >> bit & 1) == wanted


@FEW
@given(st.lists(st.lists(st.booleans(), min_size=20, max_size=20), min_size=1, max_size=3))
def test_whatever_trains_returns(experts):
    natives = [
        tuple(torch.empty(0, requires_grad=trains) for trains in expert) for expert in experts
    ]
    trained = list_trained(find_trained(natives), 20)
    wanted = [i for i in range(20) if any(expert[i] for expert in experts)]
    own = MASK_BITS - 1  # weights with a bit of their own
    assert set(wanted) <= set(trained)
    assert [i for i in trained if i < own] == [i for i in wanted if i < own]
    assert trained == sorted(trained)


@FEW
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
            st.lists(st.integers(1, 5), min_size=1, max_size=2),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_weights_of_several_dtypes_travel_in_one_parcel(weights):
    experts = [tuple(torch.randn(shape).to(dtype) for dtype, shape in weights) for _ in range(2)]
    parcel = Parcel.of(experts[0])
    slots = torch.cat([part for expert in experts for part in parcel.flatten(expert)])
    assert slots.dtype == parcel.dtype
    assert len(slots) == 2 * parcel.width
    for expert, arrived in zip(experts, parcel.split(slots), strict=True):
        for weight, other in zip(expert, arrived, strict=True):
            assert other.dtype == weight.dtype
            assert torch.equal(weight, other)
            if parcel.dtype == torch.uint8:
                assert other.storage_offset() * other.dtype.itemsize % ALIGNMENT == 0
    common = find_common_dtype(experts[0])
    assert all(torch.can_cast(weight.dtype, common) for weight in experts[0])
