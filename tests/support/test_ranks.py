"""The harness that runs ranks as forked processes, itself under test."""

import contextlib
import multiprocessing
import os
import signal
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from support.ranks import RankError, RankHangError, run_ranks


def test_results_come_back_in_rank_order():
    def add_ranks(rank, world_size, offset):
        total = torch.tensor([rank + offset])
        dist.all_reduce(total)
        return rank, world_size, total

    results = run_ranks(add_ranks, 3, 10)
    assert [(rank, size) for rank, size, _ in results] == [(0, 3), (1, 3), (2, 3)]
    assert all(total.item() == 33 for _, _, total in results)


def test_a_rank_has_one_thread():
    assert run_ranks(lambda rank, size: torch.get_num_threads(), 2) == [1, 1]


def test_an_error_shows_its_rank_and_traceback_and_ends_the_others():
    def fail_on_one(rank, world_size):
        print(f"rank {rank} says hello")
        if rank == 1:
            raise KeyError("the cause")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2 raised") as failure:
        run_ranks(fail_on_one, 2, timeout=50)
    assert time.monotonic() - start < 20
    assert "in fail_on_one" in str(failure.value)
    assert "KeyError: 'the cause'" in str(failure.value)
    assert "rank 1 says hello" in str(failure.value)


def test_the_first_error_comes_first():
    def fail_and_lose_peer(rank, world_size):
        if rank == 1:
            raise KeyError("the cause")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(RankError) as failure:
        run_ranks(fail_and_lose_peer, 2)
    assert str(failure.value).startswith("rank 1 of 2 raised")


def test_a_killed_rank_is_named_with_its_signal():
    def kill_one(rank, world_size):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RankError, match="rank 0 was killed by SIGKILL"):
        run_ranks(kill_one, 2, timeout=50)


def test_a_hang_shows_a_stack_of_every_rank():
    def wait_for_nobody(rank, world_size):
        if rank == 0:
            dist.recv(torch.empty(1), src=1)
        else:
            sleep_without_end()

    def sleep_without_end():
        time.sleep(60)

    with pytest.raises(RankHangError, match=r"ranks \[0, 1\] of 2 did not end") as failure:
        run_ranks(wait_for_nobody, 2, timeout=3)
    first, second = str(failure.value).split("rank 1:")
    assert "in recv" in first
    assert "in wait_for_nobody" in first
    assert "in sleep_without_end" in second


def test_no_process_is_left_behind():
    # Other tests may have left one that multiprocessing keeps to the end.
    before = psutil.Process().children(recursive=True)
    with pytest.raises(RankHangError):
        run_ranks(lambda rank, size: time.sleep(60), 2, timeout=1)
    assert psutil.Process().children(recursive=True) == before


def test_what_a_rank_starts_ends_with_it():
    """A process that it has not waited for, as Megatron's writer of checkpoints has one."""

    def work(rank, size):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        return process.pid

    (pid,) = run_ranks(work, 1)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=5)
