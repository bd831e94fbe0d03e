"""Ranks that are late at random: no deadlock, the same numbers, the same collectives on all."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_llep.config import LLEPConfig
from support.chaos import SkewedRouting, make_delays, watch_collectives
from support.layout import Layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.routing import PATTERNS, Routing
from support.training import Run, train

SEED = 20260
LENDING = "LLEP_LENDING"
LAYOUTS = (
    Layout(ep=2),
    Layout(tp=2, ep=2, etp=1),
    Layout(ep=4),
    Layout(pp=2, ep=2),
    Layout(ep=2, dp=4),
)
RECOMPUTES: tuple[dict[str, Any], ...] = (
    {},
    {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
)
OVERLAPS: tuple[dict[str, bool], ...] = (
    {},
    {"overlap_grad_reduce": True},
    {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
)


@dataclass(frozen=True)
class Draw:
    """One random case."""

    number: int
    run: Run
    llep: LLEPConfig


def make_draw(number: int) -> Draw:
    draw = random.Random(f"{SEED} {number}")
    layout = LAYOUTS[number % len(LAYOUTS)]
    ddp = draw.choice(OVERLAPS)
    adam = {"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5}
    return Draw(
        number,
        Run(
            layout=layout,
            routing=draw_routing(draw, layout.ep),
            steps=2,
            micro_batches=2 * layout.data_parallel,
            micro_batch_size=draw.choice((1, 2)),
            config=draw.choice(RECOMPUTES),
            ddp=ddp,
            optimizer=adam if "use_distributed_optimizer" in ddp else {},
        ),
        replace(
            EAGER,
            planner=draw.choice(("exact", "lla")),
            min_tokens_per_gemm=draw.choice((1, 8)),
            imbalance_threshold=draw.choice((1.0, 1.0, 1.3)),
            token_assignment=draw.choice(("local_first", "rank_order")),
            foreign_weights=draw.choice((None, "keep", "refetch")),
            max_foreign_experts=draw.choice((None, None, 1, 2)),
            scatter_from=draw.choice((2, 3, 0)),
            expert_gemm=draw.choice(("megatron", "grouped_mm")),
        ),
    )


def draw_routing(draw: random.Random, ranks: int) -> Routing:
    if draw.random() < 0.5:
        return Routing(draw.choice(PATTERNS), ranks)
    return SkewedRouting("skewed", ranks, skew=draw.uniform(0, 3), seed=draw.randrange(1000))


def train_draw(draw: Draw, rank: int):
    """Train plain and in time, then with LLEP and late; what was lent, and the calls made."""
    print(draw, flush=True)  # shown after a hang
    try:
        plain = train(draw.run)
        with watch_collectives(make_delays(draw.number, rank)) as calls:
            lending = train_with_llep(draw.run, draw.llep)
        assert_same_run(lending, plain)
    except Exception as error:
        error.add_note(str(draw))
        raise
    return lending.observed.transfers, calls


def train_draws(numbers: range, *, timeout: float) -> int:
    """Train these draws, those of one world size in one process group; experts lent in all."""
    draws = [make_draw(number) for number in numbers]
    lent = 0
    for world_size in sorted({draw.run.layout.world_size for draw in draws}):
        alike = [draw for draw in draws if draw.run.layout.world_size == world_size]
        lent += train_alike(alike, world_size, timeout)
    return lent


def train_alike(draws: list[Draw], world_size: int, timeout: float) -> int:
    results = run_ranks(
        lambda rank, size: [train_draw(draw, rank) for draw in draws], world_size, timeout=timeout
    )
    lent = 0
    for draw, *ranks in zip(draws, *results, strict=True):
        ep = draw.run.layout.ep
        # Expert-parallel groups are neighbours in all of these layouts.
        for first in range(0, world_size, ep):
            (transfers, calls), *others = ranks[first : first + ep]
            lent += transfers
            # The first one opens the connections, when LLEP is switched on.
            exchanges = sum(desc == LENDING for _, desc, _ in calls) - 1
            assert (exchanges > 0) == (transfers > 0), draw
            for _, other in others:
                assert other == calls, f"{draw}: not the same collectives"
    return lent


def test_late_ranks_change_nothing():
    assert train_draws(range(6), timeout=120) > 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_late_ranks_change_nothing_in_any_of_200_draws():
    # In parts: every process group that Megatron makes holds threads until its process ends, some
    # 45 a draw; with 40 draws a process the machine did little but switch between them.
    for first in range(0, 200, 10):
        assert train_draws(range(first, first + 10), timeout=300) > 0


def test_different_collectives_are_seen():
    """The comparison above is of something: two ranks that differ have different logs."""

    def work(rank, size):
        with watch_collectives() as calls:
            dist.barrier()
            dist.all_reduce(torch.ones(1))
            if rank == 0:
                dist.send(torch.ones(1), 1)
            else:
                dist.recv(torch.ones(1), 0)
        return calls

    first, second = run_ranks(work, 2)
    assert (
        first[:-1] == second[:-1] == [("barrier", "default_pg", 2), ("allreduce", "default_pg", 2)]
    )
    assert first != second
