"""The exchanges that calibration times: what is sent, and that ranks send it.

Shape letters: P ranks, R of them on each node.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_llep.offline.calibration import clock as timing
from megatron_llep.offline.calibration.clock import Clock
from megatron_llep.offline.calibration.exchanges import (
    find_overlap,
    list_regular,
    list_uneven,
    time_link,
)
from megatron_llep.offline.calibration.fit import TransferTiming
from megatron_llep.offline.calibration.reach import reach_across, reach_inside
from megatron_llep.offline.ranks import run_ranks

SIZES = (600, 1200, 2400)


@pytest.mark.parametrize("P", [2, 3, 4])
def test_what_is_sent(P):
    even, one_way, half_back = np.split(np.array(list_regular(reach_inside(P, P), SIZES)), 3)
    for kind, back in ((even, 1), (one_way, 0), (half_back, 0.5)):
        timings = [TransferTiming(sent=sent, seconds=1.0) for sent in kind]
        assert [timing.busiest for timing in timings] == [(n, n * back) for n in SIZES]
    assert (even[0] > 0).sum() == P * (P - 1)
    assert (half_back[0] > 0).sum() == 2
    uneven = list_uneven(reach_inside(P, P), SIZES * 2)
    for sent, size in zip(uneven, SIZES * 2, strict=True):
        assert not sent.diagonal().any()
        # Rounded down, each by itself.
        assert size - P <= TransferTiming(sent=sent, seconds=1.0).busiest[0] <= size
    if P > 2:
        assert len({(sent > 0).sum() for sent in uneven}) > 1


def test_uneven_exchanges_of_one_node():
    assert [sent.tolist() for sent in list_uneven(reach_inside(3, 3), SIZES)] == [
        [[0, 83, 181], [106, 0, 137], [352, 247, 0]],
        [[0, 315, 612], [0, 0, 587], [0, 340, 0]],
        [[0, 1660, 739], [319, 0, 425], [838, 245, 0]],
    ]


def list_kinds(reach) -> list[list[list[int]]]:
    return [sent.tolist() for sent in list_regular(reach, [600])]


def test_what_is_sent_inside_nodes():
    assert list_kinds(reach_inside(4, 2)) == [
        [[0, 600, 0, 0], [600, 0, 0, 0], [0, 0, 0, 600], [0, 0, 600, 0]],
        [[0, 600, 0, 0], [0, 0, 0, 0], [0, 0, 0, 600], [0, 0, 0, 0]],
        [[0, 600, 0, 0], [300, 0, 0, 0], [0, 0, 0, 600], [0, 0, 300, 0]],
    ]


def test_what_is_sent_between_nodes():
    assert list_kinds(reach_across(4, 2)) == [
        [[0, 0, 300, 300], [0, 0, 300, 300], [300, 300, 0, 0], [300, 300, 0, 0]],
        [[0, 0, 600, 0], [0, 0, 0, 600], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 600, 0], [0, 0, 0, 600], [300, 0, 0, 0], [0, 300, 0, 0]],
    ]
    # A third node has nobody behind it.
    even, one_way, _ = list_kinds(reach_across(3, 1))
    assert even == [[0, 300, 300], [300, 0, 300], [300, 300, 0]]
    assert one_way == [[0, 600, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(("P", "R"), [(4, 2), (6, 3), (6, 2), (3, 1), (2, 1)])
def test_uneven_exchanges_stay_on_their_link(P, R):
    ranks = np.arange(P)
    same_node = ranks[:, None] // R == ranks // R
    for reach, is_allowed in ((reach_inside(P, R), same_node), (reach_across(P, R), ~same_node)):
        if reach.is_empty:
            continue
        for sent, size in zip(list_uneven(reach, SIZES * 2), SIZES * 2, strict=True):
            assert not sent[~is_allowed | np.eye(P, dtype=bool)].any()
            assert size - P <= TransferTiming(sent=sent, seconds=1.0).busiest[0] <= size


@pytest.mark.parametrize("reach", [reach_inside(1, 1), reach_inside(2, 1), reach_across(2, 2)])
def test_nobody_to_talk_to(reach):
    assert reach.is_empty
    assert list_regular(reach, SIZES) == list_uneven(reach, SIZES) == []


def time_rank(rank: int, store: Path, P: int) -> tuple[list[float], float, int]:
    """One of P ranks over gloo: seconds, overlap, and runs of a step that takes too long."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), P), rank=rank, world_size=P)
    clock, reach = Clock(torch.device("cpu"), repeats=2), reach_inside(P, P)
    found = time_link(clock, reach, SIZES, rounds=2)
    assert found is not None
    assert (len(found.regular), len(found.uneven)) == (3 * len(SIZES), len(SIZES))
    overlap = find_overlap(clock, reach, 1000)
    assert time_link(clock, reach_across(P, P), SIZES, rounds=2) is None
    runs: list[int] = []
    timing.LIMIT_SECONDS = 0.0
    clock.time_in_turns([lambda: runs.append(rank)], rounds=31)
    dist.destroy_process_group()
    return [each.seconds for each in [*found.regular, *found.uneven]], overlap, len(runs)


def test_three_ranks_time_the_same():
    ranks = run_ranks(time_rank, 3, 3, limit_seconds=120)
    seconds = [timings for timings, *_ in ranks]
    assert seconds[0] == seconds[1] == seconds[2]
    assert min(seconds[0]) > 0
    assert len(seconds[0]) == 4 * len(SIZES)
    assert all(0 <= overlap <= 1 for _, overlap, _ in ranks)
    assert [runs for *_, runs in ranks] == [1 + timing.LEAST_ROUNDS] * 3
