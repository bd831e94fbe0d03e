"""Rows that arrived, by slot and back, in any parts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llep.placement import join_by_source, order_by_slot, split_by_slot

CPU = torch.device("cpu")


@st.composite
def arrivals(draw):
    """Counts [R, slots] and parts of the slots, some of them empty."""
    num_sources = draw(st.integers(1, 4))
    parts = draw(st.lists(st.integers(0, 3), min_size=1).filter(lambda sizes: sum(sizes) != 1))
    size = num_sources * sum(parts)
    counts = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return np.array(counts, dtype=np.int64).reshape(num_sources, -1), parts


@settings(deadline=None)
@given(arrivals(), st.sampled_from([(), (2,), (4,)]))
def test_rows_are_sorted_and_come_back(case, shape):
    counts, parts = case
    num_sources, num_slots = counts.shape
    where = [
        (slot, source, number)
        for source in range(num_sources)
        for slot in range(num_slots)
        for number in range(int(counts[source, slot]))
    ]
    rows = torch.arange(float(len(where))).view(-1, *(1 for _ in shape)).repeat(1, *shape)
    rows = rows.view(-1, *shape).requires_grad_()
    by_slot = order_by_slot(counts, CPU)
    sizes = [int(c.sum()) for c in np.split(counts, np.cumsum(parts)[:-1], axis=1)]
    found = split_by_slot(rows, by_slot, sizes)
    order = [where.index(place) for place in sorted(where)]
    assert torch.equal(torch.cat(found), rows[order])
    assert [len(part) for part in found] == sizes

    # Gradients reach every part, also those of no slots.
    reached = []
    for number, part in enumerate(found):
        part.register_hook(lambda _, number=number: reached.append(number))
    back = join_by_source(found, by_slot)
    assert torch.equal(back, rows)
    back.backward(rows.detach() + 1)
    assert torch.equal(rows.grad, rows + 1)
    assert sorted(reached) == list(range(len(parts)))


def test_rows_for_one_slot_are_not_copied():
    by_slot = order_by_slot(np.array([[3], [2]]), CPU)
    rows = torch.ones(5, 4)
    (found,) = split_by_slot(rows, by_slot, [5])
    assert found is rows
    assert join_by_source([found], by_slot) is rows


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [24, 5])
def test_every_bit_comes_back(dtype, columns):
    check_bits(dtype, columns, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [24, 5])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_bit_comes_back_on_a_gpu(dtype, columns, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        check_bits(dtype, columns, torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)


def check_bits(dtype: torch.dtype, columns: int, device: torch.device) -> None:
    """Whatever the rows hold, and wherever in memory they begin."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(256, (7, columns * dtype.itemsize), generator=generator).byte().to(device)
    rows = bits.view(dtype)
    by_slot = order_by_slot(np.array([[2, 0, 1], [1, 3, 0]]), device)
    assert by_slot.tolist() == [0, 1, 3, 4, 5, 6, 2]
    parts = split_by_slot(rows, by_slot, [3, 4])
    moved = [torch.cat((part.new_zeros(1), part.ravel()))[1:].view_as(part) for part in parts]
    for each in (parts, moved):
        assert torch.equal(join_by_source(each, by_slot).view(torch.uint8), bits)
