"""Routes of pieces: every borrower gets every number, every gradient comes home once, and the
traffic's formula says what each rank sends and receives.

Letters: P ranks, W numbers in an expert, k borrowers of an expert, F foreign experts of a rank.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.lending.transfers import Exchange, Piece, RankTransfers, find_lent, list_pieces
from megatron_llep.planner import Plan, make_plan, plan_from_quota
from megatron_llep.planner.cost.traffic import count_lending
from megatron_llep.planner.loops.pieces import ALIGNMENT
from megatron_llep.planner.topology import ONE_NODE, Topology
from planner.planner_routings import KINDS, REPRODUCIBLE, make_counts
from support.spread import spread_experts

Buffers = list[np.ndarray]
"""Of each rank: [experts, W]."""


def run_exchange(
    exchanges: list[Exchange], sources: Buffers
) -> list[list[tuple[Piece, np.ndarray]]]:
    """What each rank receives when all pack their pieces, in order, for each peer."""
    P = len(exchanges)
    wire = {
        (r, peer): [sources[r][p.expert, p.start : p.stop] for p in each.sends if p.peer == peer]
        for r, each in enumerate(exchanges)
        for peer in range(P)
    }
    received: list[list[tuple[Piece, np.ndarray]]] = []
    for r, each in enumerate(exchanges):
        assert [p.peer for p in each.sends] == sorted(p.peer for p in each.sends)
        assert [p.peer for p in each.receives] == sorted(p.peer for p in each.receives)
        assert all(p.peer != r for p in (*each.sends, *each.receives))
        arrived = []
        for peer in range(P):
            # One flat stretch a peer: borders are the receiver's own, as in an all-to-all.
            flat = np.concatenate([np.zeros(0), *wire[peer, r]])
            for piece in (p for p in each.receives if p.peer == peer):
                size = piece.stop - piece.start
                arrived.append((piece, flat[:size]))
                flat = flat[size:]
            assert len(flat) == 0, "more is sent than expected"
        received.append(arrived)
    return received


def fetch(routes: list[RankTransfers], natives: Buffers, width: int) -> Buffers:
    """The foreign slots [F, W] of each rank after all exchanges."""
    slots = [np.full((route.num_foreign, width), np.nan) for route in routes]
    for number in range(len(routes[0].exchanges)):
        sources = slots if number else natives
        for r, arrived in enumerate(run_exchange([x.exchanges[number] for x in routes], sources)):
            for piece, values in arrived:
                assert np.isnan(slots[r][piece.expert, piece.start : piece.stop]).all(), "twice"
                slots[r][piece.expert, piece.start : piece.stop] = values
    return slots


def give_back(routes: list[RankTransfers], grads: Buffers, natives: Buffers) -> Buffers:
    """The sums of the gradients [M, W] at each home."""
    grads = [each.copy() for each in grads]
    totals = [np.zeros_like(each) for each in natives]
    for exchanges in list(zip(*(route.exchanges for route in routes), strict=True))[:0:-1]:
        backward = [each.reverse() for each in exchanges]
        for r, arrived in enumerate(run_exchange(backward, grads)):
            for piece, values in arrived:
                grads[r][piece.expert, piece.start : piece.stop] += values
    backward = [route.exchanges[0].reverse() for route in routes]
    for r, arrived in enumerate(run_exchange(backward, grads)):
        for piece, values in arrived:
            totals[r][piece.expert, piece.start : piece.stop] += values
    return totals


def check_routes(plan: Plan, width: int, scatter_from: int, topology: Topology = ONE_NODE) -> None:
    P, M = plan.num_ranks, plan.experts_per_rank
    options = {"width": width, "scatter_from": scatter_from, "node_size": topology.node_size(P)}
    routes = [RankTransfers.of(plan, r, **options) for r in range(P)]
    experts = np.arange(plan.num_experts * width, dtype=float).reshape(-1, width) + 1
    natives = [experts[r * M : (r + 1) * M] for r in range(P)]
    for r, slots in enumerate(fetch(routes, natives, width)):
        held = plan.foreign_experts[r]
        assert np.array_equal(slots, experts[held[held >= 0]])

    rng = np.random.default_rng(0)
    grads = [rng.integers(1, 100, (route.num_foreign, width)).astype(float) for route in routes]
    expected = np.zeros_like(experts)
    for r in range(P):
        held = plan.foreign_experts[r]
        np.add.at(expected, held[held >= 0], grads[r])
    assert np.array_equal(np.concatenate(give_back(routes, grads, natives)), expected)
    for r, route in enumerate(routes):
        assert find_lent(plan, r) == sorted({piece.expert for piece in route.exchanges[0].sends})
    check_traffic(routes, count_lending(plan, width, scatter_from, topology), topology)


def check_traffic(routes, traffic, topology) -> None:
    """The formula's numbers and messages are those of the pieces, rank by rank, link by link."""
    assert {len(route.exchanges) for route in routes} == {len(traffic)}
    for number, formula in enumerate(traffic):
        for r, route in enumerate(routes):
            exchange = route.exchanges[number]
            for way, pieces in enumerate((exchange.sends, exchange.receives)):
                far = [topology.node_of(p.peer) != topology.node_of(r) for p in pieces]
                sizes = [p.stop - p.start for p in pieces]
                for link in range(len(formula.numbers)):
                    mine = [size for size, is_far in zip(sizes, far, strict=True) if is_far == link]
                    assert formula.numbers[link, way, r] == sum(mine)
                    assert formula.messages[link, way, r] == len(mine)


@REPRODUCIBLE
@given(
    kind=st.sampled_from(KINDS),
    nodes=st.sampled_from([1, 2]),
    per_node=st.sampled_from([1, 2, 3, 4]),
    M=st.integers(1, 4),
    planner=st.sampled_from(["exact", "lla", "tolerant"]),
    width=st.sampled_from([1, 5, 63, 64, 65, 200, 449, 3 * 64]),
    scatter_from=st.sampled_from([0, 2, 3, 4]),
    seed=st.integers(0, 9),
)
def test_any_plan(kind, nodes, per_node, M, planner, width, scatter_from, seed):
    P = nodes * per_node
    counts = make_counts(kind, P, M, seed)
    options = {"imbalance_threshold": 0.0, "min_tokens_per_gemm": 0}
    plan = make_plan(counts, planner=planner, **options)
    check_routes(plan, width, scatter_from, Topology(ranks_per_node=per_node))


@pytest.mark.parametrize("scatter_from", [0, 2, 3, 9])
@pytest.mark.parametrize("ranks", [4, 5, 8])
def test_several_shared_experts(ranks, scatter_from):
    plan = spread_experts(np.arange(100, 100 + 3 * ranks), ranks)
    check_routes(plan, 449, scatter_from)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_bytes_of_the_formula(k):
    """Direct: the home's link carries k W. In shards: W, and (k-1)/k W between borrowers."""
    W, P = 7 * 6 * ALIGNMENT, 8
    quota = np.zeros((P, P), dtype=np.int64)
    quota[0, : k + 1] = 10
    plan = plan_from_quota(quota)
    (direct,) = count_lending(plan, W, 0, ONE_NODE)
    assert direct.numbers[0, :, 0].tolist() == [k * W, 0]
    assert direct.numbers[0, 1, 1 : k + 1].tolist() == [W] * k
    first, second = count_lending(plan, W, 2, ONE_NODE)
    assert first.numbers[0, :, 0].tolist() == [W, 0]
    assert first.numbers[0, 1, 1 : k + 1].tolist() == [W // k] * k
    for way in (0, 1):
        assert second.numbers[0, way, : k + 1].tolist() == [0, *[(k - 1) * W // k] * k]
    one_after_another = first.numbers.max() + second.numbers.max()
    assert one_after_another == (2 * k - 1) * W // k < k * W
    total = first.numbers[0, 0].sum() + second.numbers[0, 0].sum()
    assert total == direct.numbers[0, 0].sum()


@given(width=st.integers(1, 10_000), shards=st.integers(2, 15))
@REPRODUCIBLE
def test_shards_cover_the_expert(width, shards):
    quota = np.zeros((16, 16), dtype=np.int64)
    quota[0, : shards + 1] = 10
    pieces = list_pieces(plan_from_quota(quota), width, 2, 16)
    first = pieces[pieces[:, 0] == 0]
    cuts = [*first[:, 4].tolist(), width]
    assert cuts[1:] == first[:, 5].tolist()
    assert cuts[0] == 0
    assert np.diff(cuts).max() < width / shards + ALIGNMENT
    assert all(cut % ALIGNMENT == 0 or cut == width for cut in cuts)


@pytest.mark.parametrize("scatter_from", [0, 2, 3, 4])
@pytest.mark.parametrize("ranks_each", [1, 2, 4])
def test_an_expert_crosses_once_to_a_node(ranks_each, scatter_from):
    """Expert 0 lent to all ranks of its own node and to some of three others."""
    W, G, nodes = 3 * 4 * 4 * ALIGNMENT, 4, 4
    P = G * nodes
    quota = np.zeros((P, P), dtype=np.int64)
    quota[0, :G] = 10
    for node in range(1, nodes):
        quota[0, node * G : node * G + ranks_each] = 10
    plan = plan_from_quota(quota)
    topology = Topology(ranks_per_node=G)
    check_routes(plan, W, scatter_from, topology)
    across = sum(each.numbers[1] for each in count_lending(plan, W, scatter_from, topology))
    sent, received = across.reshape(2, nodes, G).sum(axis=2).tolist()
    t = nodes - 1
    in_shards = 0 < scatter_from <= t
    assert received == [0] + [W] * t
    assert sent == ([W] + [W * (t - 1) // t] * t if in_shards else [t * W] + [0] * t)
