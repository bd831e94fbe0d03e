"""A rank that fails does not leave the others waiting, and they say where they were."""

import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_llep.integration.convert import convert_model
from megatron_llep.lending.groups import make_groups
from megatron_llep.lending.progress import Progress
from support.chaos import end_ranks, watch_collectives
from support.layout import Layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, train

# Two layers and two micro-batches a rank and step.
RUN = Run(layout=Layout(ep=2), routing=Routing("hot"), steps=3)
COUNTS = "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"
TOKENS = "EXPERT_MODEL_PARALLEL_GROUP"
LENDING = "LLEP_LENDING"

# Where rank 1 fails: ahead of which call on which group, counted from 1, and what rank 0 must say.
# In a micro-batch each layer makes one call for counts in forward and one to compare plans, three
# for tokens in forward and three in backward, and one to lend and one to return. Conversion makes
# one in the lending group.
PLACES = {
    "count": (COUNTS, 2 * 5 + 1, "forward of layer 2, micro-batch 3 "),
    "lend": (LENDING, 1 + 9, "forward of layer 1, micro-batch 3 "),
    "dispatch": (TOKENS, 24 + 4, "forward of layer 2, micro-batch 3 "),
    "combine backward": (TOKENS, 24 + 7, "backward of layer 2, micro-batch 3 "),
    "return": (LENDING, 1 + 8 + 4, "backward of layer 1, micro-batch 3 "),
}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def throw():
    raise KeyError("the cause")


def hang():
    time.sleep(9)


def train_and_fail(rank, *, place, fail, pg_timeout):
    """Train; rank 1 fails at a place. Errors are told as a training script tells them."""
    group, number, _ = PLACES[place]
    calls_left = number if rank == 1 else -1

    def fail_in_time(call):
        nonlocal calls_left
        calls_left -= call[1] == group
        if calls_left == 0:
            calls_left = -1
            time.sleep(0.3)  # until the other rank waits for this one
            fail()

    progress = Progress()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            parallel_state,
            "initialize_model_parallel",
            partial(
                parallel_state.initialize_model_parallel,
                distributed_timeout_minutes=pg_timeout / 60,
            ),
        )
        with watch_collectives(fail_in_time), progress.told_in_errors():
            train(
                RUN, transform_model=lambda chunks: convert_model(chunks, EAGER, progress=progress)
            )


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_rank_ends_the_other_with_its_place(place):
    work = partial(train_and_fail, place=place, fail=kill, pg_timeout=60)
    survivor, _ = end_ranks(work, 2, pg_timeout=60)
    assert survivor.error.count("megatron_llep: ") == 1
    assert f"this rank entered last: {PLACES[place][2]}" in survivor.error
    assert survivor.seconds < 30


@pytest.mark.parametrize("place", ["lend", "combine backward"])
def test_a_rank_that_raises_ends_both(place):
    work = partial(train_and_fail, place=place, fail=throw, pg_timeout=60)
    survivor, failed = end_ranks(work, 2, pg_timeout=60)
    for ending in survivor, failed:
        assert f"this rank entered last: {PLACES[place][2]}" in ending.error
    assert "KeyError: 'the cause'" in failed.error
    assert "KeyError" not in survivor.error


# Its schedule runs the steps of a layer one by one. Megatron wants the flag; this is fp32.
OVERLAPPED = replace(
    RUN,
    config={
        "overlap_moe_expert_parallel_comm": True,
        "bf16": True,
        "attention_softmax_in_fp32": False,
    },
)


@pytest.mark.parametrize("run", [RUN, OVERLAPPED], ids=["layers", "steps"])
def test_an_error_in_a_layer_names_it_with_no_help_from_the_script(run):
    def work(rank):
        def spoil(chunks):
            convert_model(chunks, EAGER)
            chunks[0].decoder.layers[1].mlp.experts.forward = lambda *_: throw()

        train(run, transform_model=spoil)

    for ending in end_ranks(work, 2, pg_timeout=60):
        assert "KeyError: 'the cause'" in ending.error
        assert "this rank entered last: forward of layer 2, micro-batch 1 " in ending.error


def test_a_rank_that_hangs_ends_the_other_within_the_time_out():
    work = partial(train_and_fail, place="return", fail=hang, pg_timeout=3)
    survivor, hanging = end_ranks(work, 2, pg_timeout=3)
    assert f"this rank entered last: {PLACES['return'][2]}" in survivor.error
    assert "Timed out" in survivor.error
    assert survivor.seconds < hanging.seconds - 2


def make_lending_group(beside):
    key = (LENDING, (0, 1))
    return make_groups({key: beside})[key]


def test_the_lending_group_has_the_time_out_of_the_expert_group():
    def wait_for_nobody(rank):
        experts = dist.new_group([0, 1], timeout=timedelta(seconds=1))
        group = make_lending_group(experts)
        if rank == 0:
            dist.all_to_all_single(torch.empty(2), torch.ones(2), group=group, async_op=True).wait()
        time.sleep(5)

    waiting, other = end_ranks(wait_for_nobody, 2, pg_timeout=100)
    assert "Timed out" in waiting.error
    assert waiting.seconds < other.seconds - 2


def test_a_changed_time_out_reaches_the_lending_group():
    def change(rank, size):
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
        group = make_lending_group(parallel_state.get_expert_model_parallel_group())
        parallel_state.update_pg_timeout(timedelta(seconds=77))
        return group._get_backend(torch.device("cpu")).options._timeout

    assert run_ranks(change, 2) == [timedelta(seconds=77)] * 2
