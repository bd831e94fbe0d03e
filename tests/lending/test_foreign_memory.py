"""Refetched foreign weights: the same training, and memory that does not grow with what waits."""

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_llep.lending.loan import WeightLoan
from support.layout import Layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, train


class LiveBytes:
    """Counts the storage behind all loans' foreign weights, by watching it change size and die."""

    def __init__(self, monkeypatch):
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        hand_out, allocate, free = (
            WeightLoan.hand_out,
            WeightLoan.start_fetch,
            WeightLoan.free_weights,
        )

        def watch(function):
            def watched(loan, *args):
                result = function(loan, *args)
                self._note(loan._weights.untyped_storage())
                return result

            return watched

        for name, function in (
            ("hand_out", hand_out),
            ("start_fetch", allocate),
            ("free_weights", free),
        ):
            monkeypatch.setattr(WeightLoan, name, watch(function))

    def _note(self, storage: torch.UntypedStorage) -> None:
        self._sizes = {k: v for k, v in self._sizes.items() if not v[0].expired()}
        self._sizes[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive())

    def alive(self) -> int:
        """Bytes whose storage still exists."""
        return sum(size for ref, size in self._sizes.values() if not ref.expired())


def run_and_measure(run: Run, foreign_weights: str) -> list[tuple[int, int, int]]:
    """Train; per rank the peak of live bytes, those at the end, and the largest loan's."""

    def work(rank, size):
        with pytest.MonkeyPatch.context() as monkeypatch:
            live = LiveBytes(monkeypatch)
            largest = 0
            start_fetch = WeightLoan.start_fetch

            def note_size(loan):
                nonlocal largest
                start_fetch(loan)
                largest = max(largest, loan._weights.nbytes)

            monkeypatch.setattr(WeightLoan, "start_fetch", note_size)
            train_with_llep(run, replace(EAGER, foreign_weights=foreign_weights))
            return live.peak, live.alive(), largest

    return run_ranks(work, run.layout.world_size, timeout=120)


def test_memory_is_bounded_by_one_layer():
    run = Run(
        layout=Layout(pp=2, ep=2),
        routing=Routing("hot"),
        steps=1,
        micro_batches=16,
        micro_batch_size=1,
        config={"num_layers": 8},
    )
    kept = run_and_measure(run, "keep")
    refetched = run_and_measure(run, "refetch")
    for rank, (peak, at_end, largest) in enumerate(refetched):
        assert peak <= largest, f"rank {rank}: more than one layer's slots at a time"
        assert at_end == 0
    # Kept, they add up: the first stage has two micro-batches in flight, the last one. The hot
    # experts of layers 0, 1, 3 and 6 are rank 0's, of the others rank 1's.
    assert [peak / largest for peak, _, largest in kept] == [2, 6, 3, 1]
    assert all(at_end == 0 for _, at_end, _ in kept), "foreign weights leak"


def test_frozen_experts_leave_nothing_behind():
    """No gradient returns; the weights are let go of in backward all the same."""

    def freeze(chunks: Chunks) -> None:
        for name, parameter in chunks[0].named_parameters():
            parameter.requires_grad_(".experts." not in name)

    run = Run(
        layout=Layout(ep=2),
        routing=Routing("natural"),
        steps=1,
        micro_batches=2,
        prepare=freeze,
        config={"num_layers": 4},
    )
    for peak, at_end, largest in run_and_measure(run, "refetch"):
        assert peak <= largest
        assert at_end == 0


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
@pytest.mark.parametrize(
    "layout", [Layout(ep=2), Layout(pp=2, vpp=2, ep=2), Layout(ep=2, dp=4)], ids=str
)
def test_training_is_the_same(layout, foreign_weights):
    run = Run(
        layout=layout,
        routing=Routing("natural"),
        micro_batches=8,
        config={"num_layers": 4},
        ddp={"overlap_grad_reduce": True},
    )

    def work(rank, size):
        llep = replace(EAGER, foreign_weights=foreign_weights)
        lending = train_with_llep(run, llep)
        assert lending.observed.transfers > 0
        assert_same_run(lending, train(run))

    run_ranks(work, layout.world_size, timeout=120)


def test_a_wrong_refetch_is_seen():
    """The tests above would notice foreign weights that are not what they were."""

    def work(rank, size):
        run = Run(layout=Layout(ep=2), routing=Routing("hot"))
        plain = train(run)
        with pytest.MonkeyPatch.context() as monkeypatch:
            finish_fetch = WeightLoan.finish_fetch

            def finish_and_spoil(loan):
                finish_fetch(loan)
                if not torch.is_grad_enabled():  # in backward
                    loan._weights.zero_()

            monkeypatch.setattr(WeightLoan, "finish_fetch", finish_and_spoil)
            lending = train_with_llep(run, replace(EAGER, foreign_weights="refetch"))
        try:
            assert_same_run(lending, plain)
        except AssertionError:
            return True
        return False

    assert all(run_ranks(work, 2))
