"""Tokens spread over the replicas of expert data parallelism: training as plain Megatron does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import (
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.metrics import LLEPMetricsTracker, record_plan
from megatron_llep.placement.forward import Planned
from megatron_llep.planner import imbalance_of, load_per_rank, plan_over_replicas
from support.layout import Layout
from support.llep import EAGER, assert_same_run, note_decisions
from support.ranks import run_ranks
from support.routing import Pattern, Routing, force_routing
from support.training import Chunks, Run, build_model, make_config, train, use_layout

LP = replace(EAGER, planner="lp", replicas="expert-dp")
EXACT = replace(LP, planner="exact")
TOLERANT = replace(LP, planner="tolerant")
ADAM = {"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5}


@dataclass(frozen=True)
class Case:
    """One run, and what is to become of its imbalance."""

    run: Run
    llep: LLEPConfig
    lends: bool
    after: float
    """Every plan's imbalance is at most this."""
    bitwise: bool = False


def route_rows(*patterns: Pattern) -> Callable[[Chunks], None]:
    """Give each row of the EP x expert-DP grid a routing of its own.

    In every layer, one_rank and starved send all tokens to the experts of two different ranks.
    """

    def prepare(chunks: Chunks) -> None:
        row = parallel_state.get_expert_data_parallel_rank()
        force_routing(chunks, Routing(patterns[row], ranks=2))

    return prepare


def make_run(*patterns: Pattern, **settings: Any) -> Run:
    """Rows that are alike (one pattern) or each of its own pattern, at EP 2 x expert-DP 2."""
    rows = patterns if len(patterns) > 1 else patterns * 2
    settings = {"layout": Layout(ep=2, dp=4), "steps": 2} | settings
    return Run(prepare=route_rows(*rows), **settings)


def compare_all(cases: Mapping[str, Case], timeout: float = 240) -> None:
    """Train every case plain and with replicas, in one process group; both must agree."""
    (world_size,) = {case.run.layout.world_size for case in cases.values()}

    def work(rank: int, size: int) -> None:
        for name, case in cases.items():
            try:
                compare(case)
            except BaseException as error:
                error.add_note(f"case: {name}")
                raise

    run_ranks(work, world_size, timeout=timeout)


def compare(case: Case) -> None:
    decisions: list[Planned] = []

    def convert(chunks: Chunks) -> None:
        convert_model(chunks, case.llep)
        note_decisions(chunks, decisions)

    plain = train(case.run)
    tolerances = {"loss_tolerance": 0, "gradient_tolerance": 0} if case.bitwise else {}
    assert_same_run(train(case.run, transform_model=convert), plain, **tolerances)

    assert decisions
    lent = sum(len(decision.plan.transfers) for decision in decisions)
    assert (lent > 0) == case.lends, f"{lent} experts were lent"
    for decision in decisions:
        before = imbalance_of(decision.load_before.tolist())
        after = decision.plan.imbalance_after
        assert after <= min(before, case.after), f"imbalance {before} before, {after} after"
    worst = max(imbalance_of(decision.load_before.tolist()) for decision in decisions)
    assert worst > case.after or case.after == 2


CASES = {
    # A rank has all tokens of its row; the other row has none for these experts.
    "lp, opposite rows": Case(make_run("one_rank", "starved"), LP, lends=False, after=1.0),
    "lp, hot and balanced": Case(make_run("hot", "balanced"), LP, lends=False, after=1.3),
    # Replicas that are equally hot are no help, and do no harm.
    "lp, rows alike": Case(make_run("one_rank"), LP, lends=False, after=2.0),
    "below the threshold": Case(
        make_run("one_rank", "starved"),
        replace(EXACT, imbalance_threshold=9.0),
        lends=False,
        after=2.0,
        bitwise=True,
    ),
    "exact": Case(make_run("one_rank", "natural"), EXACT, lends=True, after=1.05),
    "tolerant, distributed optimizer": Case(
        make_run(
            "hot",
            "one_rank",
            steps=3,  # what is lent before it is gathered shows from the second on
            ddp={
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            optimizer=ADAM,
        ),
        replace(TOLERANT, grad_dtype="param"),
        lends=True,
        after=1.1,
    ),
    "exact, recompute": Case(
        make_run(
            "hot",
            "starved",
            config={"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        ),
        EXACT,
        lends=True,
        after=1.05,
    ),
    "exact, refetch, overlapped reduction": Case(
        make_run("one_rank", "balanced", micro_batches=8, ddp={"overlap_grad_reduce": True}),
        replace(EXACT, foreign_weights="refetch", token_assignment="rank_order"),
        lends=True,
        after=1.05,
    ),
    "exact, tensor parallelism": Case(
        make_run("one_rank", "balanced", layout=Layout(tp=2, ep=2, etp=1, dp=2)),
        EXACT,
        lends=True,
        after=1.05,
    ),
}


def test_training_at_two_replicas():
    compare_all(CASES)


WIDE_CASES = {
    "expert tensor parallelism": Case(
        make_run("one_rank", "balanced", layout=Layout(tp=2, ep=2, etp=2, dp=4)),
        EXACT,
        lends=True,
        after=1.05,
    ),
    "pipeline": Case(
        make_run(
            "one_rank",
            "hot",
            layout=Layout(pp=2, vpp=2, ep=2, dp=4),
            micro_batches=8,
            config={"num_layers": 4},
        ),
        EXACT,
        lends=True,
        after=1.05,
    ),
    "four replicas": Case(
        make_run(
            "one_rank", "starved", "hot", "balanced", layout=Layout(ep=2, dp=8), micro_batches=8
        ),
        TOLERANT,
        lends=True,
        after=1.1,
    ),
    "four replicas, lp": Case(
        make_run(
            "one_rank", "hot", "balanced", "starved", layout=Layout(ep=2, dp=8), micro_batches=8
        ),
        LP,
        lends=False,
        after=1.3,
    ),
}


@pytest.mark.slow
def test_training_in_wide_layouts():
    compare_all(WIDE_CASES)


def test_metrics_compare_with_plain_expert_parallelism():
    # 60 tokens on one of four ranks, 20 on each other: replicas alone bring it to 40.
    counts = np.array([[30, 0, 0, 0], [20, 10, 10, 10], [5, 5, 5, 5], [5, 5, 5, 5]])
    plan, _ = plan_over_replicas(
        counts, num_replicas=2, num_ranks=4, planner="lp", imbalance_threshold=1.0
    )
    tracker = LLEPMetricsTracker()
    before = get_moe_metrics_tracker()
    set_moe_metrics_tracker(tracker)
    try:
        record_plan(
            plan,
            load_per_rank(counts, 2, 4),
            layer_number=1,
            is_mtp_layer=False,
            config=SimpleNamespace(num_layers=1),
            expert_bytes=1,
            foreign_bytes=0,
            plan_seconds=0,
        )
    finally:
        set_moe_metrics_tracker(before)
    values = tracker.read_layer(0)
    assert values["max_tokens_before"] == 60
    assert values["max_tokens_after"] == 40
    assert values["overload_factor_before"] == 2
    assert values["overload_factor_after"] == pytest.approx(4 / 3)
    assert values["lent_experts"] == values["fallback_rate"] == 0


def test_one_replica_is_refused():
    def work(rank, size):
        run = Run(layout=Layout(ep=2))
        with use_layout(run.layout):
            chunks = build_model(make_config(run), run)
            with pytest.raises(ValueError, match=r"--moe-llep-replicas expert-dp: .* leave"):
                convert_model(chunks, LP)

    run_ranks(work, 2)
