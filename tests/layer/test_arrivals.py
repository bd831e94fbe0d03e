"""Rows that arrived, by slot and back, in any parts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.placement import join_by_source, split_by_slot


@st.composite
def arrivals(draw):
    """Counts [R, slots] and parts of the slots, some of them empty."""
    num_sources, parts = draw(st.integers(1, 4)), draw(st.lists(st.integers(0, 3), min_size=1))
    size = num_sources * sum(parts)
    counts = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return torch.tensor(counts, dtype=torch.int64).reshape(num_sources, -1), parts


@given(arrivals())
def test_rows_are_sorted_and_come_back(case):
    counts, parts = case
    num_sources, num_slots = counts.shape
    where = [
        (slot, source, number)
        for source in range(num_sources)
        for slot in range(num_slots)
        for number in range(int(counts[source, slot]))
    ]
    rows = torch.arange(2.0 * len(where)).reshape(-1, 2).requires_grad_()
    found = split_by_slot(rows, counts, parts)
    order = [where.index(place) for place in sorted(where)]
    assert torch.equal(torch.cat(found), rows[order])
    assert [len(part) for part in found] == [int(c.sum()) for c in counts.T.split(parts)]

    # Gradients reach every part, also those of no slots.
    reached = []
    for number, part in enumerate(found):
        part.register_hook(lambda _, number=number: reached.append(number))
    back = join_by_source(found, counts, parts)
    assert torch.equal(back, rows)
    back.backward(rows.detach() + 1)
    assert torch.equal(rows.grad, rows + 1)
    assert sorted(reached) == list(range(len(parts)))
