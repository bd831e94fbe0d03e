"""The placement kernels under Triton's interpreter; `test_placement_kernel.py` runs this file.

The interpreter must be chosen before triton is imported, hence a process of its own.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_layer_float64 import TOLERANCE, build_layer, run_layer

from megatron_llep import dispatcher
from megatron_llep.integration.convert import convert_model
from megatron_llep.placement import kernel, place_tokens
from megatron_llep.placement.check import find_sum_error, has_indices
from megatron_llep.placement.forward import Planned
from megatron_llep.placement.rows import gather_rows, sum_rows
from megatron_llep.planner import list_exchange, plan_over_replicas
from megatron_llep.travel import back_ends
from support import deep_ep_stand_in
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks

TILE = kernel._TILE_TOKENS


@st.composite
def placements(draw):
    """A rank's routing map, bool [T, E], of any counts per token, and chunks from a plan."""
    D, P = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    M = draw(st.integers(1, 40))
    tokens = st.one_of(
        st.integers(0, 5),
        st.builds(lambda tiles, extra: tiles * TILE + extra, st.integers(1, 6), st.integers(-1, 1)),
    )
    density = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    favour = density * generator.random(P * M) ** draw(st.sampled_from([0, 4]))
    maps = [generator.random((draw(tokens), P * M)) < favour for _ in range(D * P)]
    plan, counts = plan_over_replicas(
        np.stack([each.sum(0) for each in maps]),
        num_replicas=D,
        num_ranks=D * P,
        planner="exact",
        imbalance_threshold=1.0,
    )
    source = draw(st.integers(0, D * P - 1))
    chunks, *_ = list_exchange(plan, counts, source, num_replicas=D)
    return torch.from_numpy(maps[source]), chunks, draw(st.integers(0, 40))


def place(routing_map, chunks, spare=0):
    listed = kernel.list_pairs(routing_map, int(routing_map.sum()) + spare)
    return kernel.place_pairs(listed, chunks, routing_map.shape[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(placements())
def test_indices_are_those_of_torch(case):
    routing_map, chunks, spare = case
    expected = place_tokens(routing_map, chunks)
    assert has_indices(place(routing_map, chunks, spare), expected, len(routing_map))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=70), st.integers(0, 1000))
@example(lengths=[0], seed=0)
@example(lengths=[0, 0, 64, 0], seed=1)
def test_chunks_of_no_pair_and_any_order(lengths, seed):
    generator = np.random.default_rng(seed)
    lengths = np.array(lengths)
    E = 3
    T = -(-int(lengths.sum()) // E)
    routing_map = torch.ones(T, E, dtype=torch.bool)
    lengths = np.append(lengths, T * E - lengths.sum())
    chunks = np.stack((lengths.cumsum() - lengths, lengths))
    chunks = chunks[:, generator.permutation(len(lengths))]
    assert has_indices(place(routing_map, chunks), place_tokens(routing_map, chunks), T)


def test_a_list_that_is_cut_writes_nothing_beyond():
    routing_map = torch.ones(40, 5, dtype=torch.bool)
    whole, cut = kernel.list_pairs(routing_map, 200), kernel.list_pairs(routing_map, 77)
    assert torch.equal(cut.pair_index, whole.pair_index[:77])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(placements(), st.sampled_from([1, 24, kernel._COLUMNS_PER_PROGRAM + 3]))
def test_sums_of_rows(case, columns):
    routing_map = case[0][: TILE + 1, :24]
    chunks = np.array([[0], [int(routing_map.sum())]])
    placement, expected = place(routing_map, chunks), place_tokens(routing_map, chunks)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(placement.token_index), columns, generator=generator)
    # The interpreter cuts bf16 off where a GPU rounds.
    for dtype, tolerance in (
        (torch.float64, 1e-15),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-7),
    ):
        error = find_sum_error(rows.to(dtype), placement, expected, len(routing_map))
        assert error <= tolerance


def test_gathering_and_summing_are_each_others_gradients():
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    placement = place(routing_map, np.array([[3, 0], [3, 3]]))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = gather_rows(hidden, placement)
    assert torch.equal(rows, hidden[placement.token_index])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, placement), hidden)
    rows = rows.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sum_rows(x, placement), rows)


def test_rows_beyond_the_reach_of_32_bits():
    columns = 2 * kernel._COLUMNS_PER_PROGRAM
    last = 2**31 // columns + 5
    rows = torch.empty(last + 1, columns, dtype=torch.bfloat16)  # its pages are not touched
    rows[last] = 3.0
    rows[7] = 1.0
    found = kernel.sum_rows(
        rows, torch.tensor([7, last], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    )
    assert (found == 4.0).all()


def place_arrived_by_kernel(is_here, chunks):
    listed = kernel.list_pairs(is_here, int(chunks[1].sum()))
    return kernel.place_pairs(listed, chunks, is_here.shape[1])


def place_by_kernel(routing_map, chunks, pairs):
    return kernel.place_pairs(pairs, chunks, routing_map.shape[1])


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(tp=2, ep=2, etp=2)], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_layer_equals_megatron(layout, overlap):
    """Dispatch and combine as on a GPU."""
    shared = {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": overlap}

    def work(rank, size):
        tokens = 8 if layout.tp > 1 else (9, 1)[rank]
        with use_layout(layout), pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(dispatcher, "list_pairs", kernel.list_pairs)
            monkeypatch.setattr(dispatcher, "place_tokens", place_by_kernel)
            plain, ours = (build_layer(layout, rank, 1.0, **shared) for _ in range(2))
            ours.load_state_dict(plain.state_dict())
            convert_model([ours], EAGER)
            planned: list[Planned] = []
            note_decisions([ours], planned)
            expected, found = run_layer(plain, rank, tokens), run_layer(ours, rank, tokens)
            for name, value in expected.items():
                assert get_relative_difference(found[name], value) <= TOLERANCE, name
            return planned[-1].plan.max_foreign

    assert all(run_ranks(work, layout.world_size))


def test_a_layer_with_deep_ep_equals_megatron():
    """Tokens that arrive once for several slots are spread and added up as on a GPU."""
    layout = Layout(ep=2)
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}

    def work(rank, size):
        deep_ep_stand_in.install()
        with use_layout(layout), pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(dispatcher, "list_pairs", kernel.list_pairs)
            monkeypatch.setattr(dispatcher, "place_tokens", place_by_kernel)
            monkeypatch.setattr(back_ends, "place_tokens", place_arrived_by_kernel)
            plain, ours = (build_layer(layout, rank, 1.0, **flex) for _ in range(2))
            convert_model([ours], replace(EAGER, dispatcher="flex"))
            planned: list[Planned] = []
            note_decisions([ours], planned)
            expected, found = run_layer(plain, rank, 9), run_layer(ours, rank, 9)
            for name, value in expected.items():
                assert get_relative_difference(found[name], value) <= TOLERANCE, name
            return planned[-1].plan.max_foreign

    assert all(run_ranks(work, 2))
