"""The exchanges that calibration times: what is sent, and that ranks send it.

Shape letters: P ranks.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_llep.offline.calibration.clock import Clock
from megatron_llep.offline.calibration.exchanges import (
    find_overlap,
    list_regular,
    list_uneven,
    time_exchanges,
)
from megatron_llep.offline.calibration.fit import TransferTiming
from megatron_llep.offline.ranks import run_ranks

SIZES = (600, 1200, 2400)


@pytest.mark.parametrize("P", [2, 3, 4])
def test_what_is_sent(P):
    even, one_way, half_back = np.split(np.array(list_regular(P, SIZES)), 3)
    for kind, back in ((even, 1), (one_way, 0), (half_back, 0.5)):
        timings = [TransferTiming(sent=sent, seconds=1.0) for sent in kind]
        assert [timing.busiest for timing in timings] == [(n, n * back) for n in SIZES]
    assert (even[0] > 0).sum() == P * (P - 1)
    assert (half_back[0] > 0).sum() == 2
    uneven = list_uneven(P, SIZES * 2)
    for sent, size in zip(uneven, SIZES * 2, strict=True):
        assert not sent.diagonal().any()
        # Rounded down, each by itself.
        assert size - P <= TransferTiming(sent=sent, seconds=1.0).busiest[0] <= size
    if P > 2:
        assert len({(sent > 0).sum() for sent in uneven}) > 1


def test_one_rank_has_nobody_to_talk_to():
    assert list_regular(1, SIZES) == list_uneven(1, SIZES) == []


def time_rank(rank: int, store: Path, P: int) -> tuple[list[TransferTiming], float]:
    """One of P ranks over gloo."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), P), rank=rank, world_size=P)
    clock = Clock(torch.device("cpu"), repeats=2)
    sent = [*list_regular(P, SIZES), *list_uneven(P, SIZES)]
    found = time_exchanges(clock, sent, rounds=2), find_overlap(clock, 1000)
    dist.destroy_process_group()
    return found


def test_three_ranks_time_the_same():
    ranks = run_ranks(time_rank, 3, 3, limit_seconds=120)
    seconds = [[timing.seconds for timing in timings] for timings, _ in ranks]
    assert seconds[0] == seconds[1] == seconds[2]
    assert min(seconds[0]) > 0
    assert len(seconds[0]) == 4 * len(SIZES)
    assert all(0 <= overlap <= 1 for _, overlap in ranks)
