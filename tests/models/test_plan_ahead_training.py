"""Training with replayed routes, planned ahead, is plain Megatron's in every schedule."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from support.layout import Layout
from support.llep import EAGER, assert_same_run, note_decisions
from support.ranks import run_ranks
from support.replayed import REPLAYING, build_chunks_anew, replaying_step
from support.training import Chunks, Run, train

OVERLAP = {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "use_distributed_optimizer": True,
}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
# Megatron wants bf16; the numbers are fp32's.
CUT = {
    "overlap_moe_expert_parallel_comm": True,
    "bf16": True,
    "attention_softmax_in_fp32": False,
}


# A large epsilon keeps the gradient's scale.
ADAM = {"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5}


def make_run(layout: Layout | None = None, *, overlaps: bool = False, **config: Any) -> Run:
    return Run(
        layout=layout or Layout(ep=2),
        config={"num_layers": 4} | REPLAYING | config,
        ddp=OVERLAP if overlaps else {},
        optimizer=ADAM if overlaps else {},
        build=build_chunks_anew,
        forward_step=replaying_step,
    )


def count_ahead(run: Run, llep: LLEPConfig = EAGER) -> list[int]:
    """Of each rank, how many layers ran in a forward and how many had been planned before.

    Raises:
        AssertionError: LLEP trains otherwise than plain Megatron, or lends nothing.
    """

    def work(rank: int, size: int) -> tuple[int, int]:
        decisions: list[Planned] = []

        def switch_on(chunks: Chunks) -> None:
            note_decisions(convert_model(chunks, llep), decisions)

        plain = train(run)
        assert_same_run(train(run, transform_model=switch_on), plain)
        assert not all(each.plan.is_fallback for each in decisions)
        return len(decisions), sum(each.ahead is not None for each in decisions)

    return run_ranks(work, run.layout.world_size, timeout=240)


def test_gathered_parameters_and_reduced_gradients_overlap():
    """Two layers of three behind the first, in 2 micro-batches of 2 steps on each rank."""
    run = make_run(overlaps=True, moe_layer_freq=[1, 1, 0, 1])
    assert count_ahead(run) == [(12, 8)] * 2


CASES = {
    # A recomputed layer counts for itself.
    "recomputed layers": (make_run(**FULL, recompute_method="uniform"), (32, 12)),
    # The last one's weights start in a forward that is not recorded, for one that is.
    "some layers recomputed": (
        make_run(**FULL | {"recompute_num_layers": 3}, recompute_method="block"),
        (28, 12),
    ),
    "recomputed experts": (make_run(**SELECTIVE), (32, 12)),
    "multi-token prediction": (make_run(num_layers=2, mtp_num_layers=2), (16, 12)),
    "the same layer predicts twice": (
        make_run(num_layers=2, mtp_num_layers=2, mtp_use_repeated_layer=True),
        (16, 8),
    ),
    "stages": (make_run(Layout(pp=2, ep=2)), (8, 4)),
    # Another micro-batch's backward may come between: each layer lends for itself.
    "overlapped exchange": (make_run(**CUT), (16, 0)),
    "expert data parallel": (make_run(Layout(ep=2, dp=4), overlaps=True), (8, 6)),
    "expert tensor parallel": (make_run(Layout(tp=2, ep=2, etp=2)), (16, 12)),
}
"""A run, and what `count_ahead` says of each rank."""


@pytest.mark.slow
@pytest.mark.parametrize(("run", "expected"), CASES.values(), ids=CASES)
def test_in_schedules(run, expected):
    assert count_ahead(run) == [expected] * run.layout.world_size


@pytest.mark.slow
def test_virtual_stages_are_chunks_of_their_own():
    """Each has two layers, and its weights are fetched again in backward."""
    run = make_run(Layout(pp=2, vpp=2, ep=2), num_layers=8)
    assert count_ahead(run) == [(16, 8)] * 4


@pytest.mark.slow
def test_ahead_in_shards_and_weights_fetched_again():
    run = make_run(Layout(ep=4))
    llep = replace(EAGER, scatter_from=2, foreign_weights="refetch")
    assert count_ahead(run, llep) == [(8, 6)] * 4
