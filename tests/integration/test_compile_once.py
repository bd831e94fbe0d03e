"""Of the ranks on a host one compiles the planners while the others wait, whatever goes wrong."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megatron_llep.config import LLEPConfig
from megatron_llep.integration import compile_once
from support.ranks import run_ranks

CONFIG = LLEPConfig(enabled=True)


def compile_in_turn(monkeypatch, compile_planners, needed=(True, True, True, True)):
    """When each of four ranks, on two hosts, compiled: (start, end), and what all of them got."""

    def work(rank, world_size):
        spans = []

        def timed(*args, **kwargs):
            start = time.monotonic()
            found = compile_planners(rank)
            spans.append((start, time.monotonic()))
            return found

        monkeypatch.setattr(compile_once, "compile_planners", timed)
        name = SimpleNamespace(gethostname=lambda: f"host{rank // 2}")
        monkeypatch.setattr(compile_once, "socket", name)
        try:
            found = compile_once.compile_once_per_host(CONFIG, needed=needed[rank])
        except ValueError as error:
            found = str(error)
        return spans, found

    spans, found = zip(*run_ranks(work, 4), strict=True)
    return spans, found


def test_one_rank_of_a_host_compiles_before_the_others(monkeypatch):
    spans, found = compile_in_turn(
        monkeypatch, lambda rank: time.sleep(0.2) or rank != 3, needed=(False, True, True, True)
    )
    assert [len(each) for each in spans] == [0, 1, 1, 1]
    assert spans[3][0][0] >= max(spans[1][0][1], spans[2][0][1])
    assert found == (False,) * 4, "rank 3 keeps no code"


@pytest.mark.parametrize("failing", [0, 3])
def test_all_ranks_raise_when_one_cannot_compile(monkeypatch, failing):
    def compile_planners(rank):
        if rank == failing:
            raise RuntimeError("no LLVM")
        return True

    _, found = compile_in_turn(monkeypatch, compile_planners)
    assert len(set(found)) == 1
    assert "no LLVM" in found[0]
    assert f"rank {failing}" in found[0]


RANK = """
import sys, time, torch.distributed as dist
from numba.core import event
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.compile_once import compile_once_per_host
import numpy as np
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
compilations = event.RecordingListener()
with event.install_listener("numba:compile", compilations):
    start = time.perf_counter()
    assert compile_once_per_host(LLEPConfig(enabled=True), needed=True)
    seconds = time.perf_counter() - start
    before_step = len(compilations.buffer)
    from megatron_llep.planner import list_exchange, make_plan
    counts = np.arange(32).reshape(4, 8) ** 2
    plan = make_plan(counts)
    list_exchange(plan, counts, 1)
    assert len(compilations.buffer) == before_step, "a step compiled"
print(before_step > 0, plan.digest, round(seconds, 2), round(time.process_time(), 2))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_with_an_empty_folder_compile_once_and_plan_alike(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines = [rank.communicate(timeout=200)[0] for rank in ranks]
    print(*lines)
    compiled, digests = zip(*(line.split()[-4:-2] for line in lines), strict=True)
    assert compiled == ("True", "False")
    assert len(set(digests)) == 1
