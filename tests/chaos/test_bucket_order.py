"""Ranks that reduce gradients together start buckets in one order, whichever of them lend."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

from support.layout import Layout
from support.llep import assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.training import Run, train

MODES = {
    "plain": ({}, {}),
    "full recompute": (
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        {},
    ),
    "moe recompute": ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, {}),
    "shared experts": (
        {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_overlap": True},
        {},
    ),
    # bf16 is a flag that Megatron wants; the numbers are fp32's.
    "overlapped exchange": (
        {
            "overlap_moe_expert_parallel_comm": True,
            "bf16": True,
            "attention_softmax_in_fp32": False,
        },
        {},
    ),
    "distributed optimizer": ({}, {"use_distributed_optimizer": True}),
    "overlapped gather": (
        {},
        {"use_distributed_optimizer": True, "overlap_param_gather": True},
    ),
}


def make_run(names: dict[torch.nn.Parameter, str], config: dict, ddp: dict) -> Run:
    """One of two expert-parallel groups lends, the other falls back; every weight is a bucket."""

    def prepare(chunks):
        lends = parallel_state.get_expert_data_parallel_rank() == 1
        force_routing(chunks, Routing("hot" if lends else "balanced"))
        names.update({weight: name for name, weight in chunks[0].named_parameters()})

    return Run(
        layout=Layout(ep=2, dp=4),
        steps=3,
        micro_batches=8,
        config=config,
        ddp={"overlap_grad_reduce": True, "bucket_size": 1} | ddp,
        optimizer={"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5} if ddp else {},
        prepare=prepare,
    )


@contextmanager
def note_starts(names: dict[torch.nn.Parameter, str]) -> Iterator[list[list[str]]]:
    """The weights of each bucket group whose reduction starts, in order."""
    started: list[list[str]] = []
    start = BucketGroup.start_grad_sync

    def start_and_note(group, *args, **kwargs):
        started.append([names[weight] for bucket in group.buckets for weight in bucket.params_list])
        return start(group, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(BucketGroup, "start_grad_sync", start_and_note)
        yield started


@pytest.mark.parametrize("mode", MODES)
def test_buckets_start_in_one_order(mode):
    def work(rank, size):
        names: dict[torch.nn.Parameter, str] = {}
        run = make_run(names, *MODES[mode])
        plain = train(run)
        with note_starts(names) as started:
            lending = train_with_llep(run)
        assert_same_run(lending, plain)
        return lending.observed.transfers > 0, started

    ranks = run_ranks(work, 4, timeout=120)
    assert [lends for lends, _ in ranks] == [False, False, True, True]
    # Ranks 0 and 2 hold the same experts, and so do 1 and 3.
    for rank in 0, 1:
        assert ranks[rank][1] == ranks[rank + 2][1]
        assert any(".experts." in name for bucket in ranks[rank][1] for name in bucket)
