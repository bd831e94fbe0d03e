"""Metrics of known routing are what NumPy makes of it, in the report and in `read_metrics`."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import (
    destroy_moe_metrics_tracker,
    get_moe_metrics_tracker,
)

from megatron_llep import LLEPConfig, read_metrics
from megatron_llep.integration.observe import make_outlook
from megatron_llep.metrics import PREFIX, install_tracker, record_plan
from megatron_llep.observe.counts import Sharers
from megatron_llep.observe.outlook import Outlook
from megatron_llep.planner import make_plan
from support.layout import Layout, use_layout
from support.metrics import report
from support.ranks import run_ranks
from support.training import Run, make_config

E, MICRO_BATCHES = 8, 3
PERCENTILES = (50, 75, 90, 95)


def make_counts(layer: int, micro_batch: int, rank: int) -> np.ndarray:
    """Tokens [E] of a rank of the job for each expert; the last expert of layer 2 is idle."""
    generator = np.random.default_rng(1000 * layer + 100 * micro_batch + rank)
    counts = generator.integers(1, 50, E)
    counts[layer % E] += 200
    if layer == 2:
        counts[-1] = 0
    return counts


def make_sharers(llep: LLEPConfig, layout: Layout) -> Sharers:
    return Sharers(
        group=parallel_state.get_expert_tensor_and_model_parallel_group(),
        num_ranks=layout.ep,
        outlook=make_outlook(make_config(Run(layout=layout)), llep),
    )


def observe(sharers: Sharers, layers: range, rank: int) -> None:
    log = install_tracker().counts
    for micro_batch in range(MICRO_BATCHES):
        for layer in layers:
            counts = make_counts(layer, micro_batch, rank)
            log.add(sharers, layer, torch.tensor(counts, dtype=torch.int32))


def expect(layers: range, groups: list[list[int]], num_ranks: int) -> dict[str, float]:
    """All but the outlook, over layers, micro-batches and groups of ranks that share tokens."""
    table = np.array(  # [layers, micro-batches, groups, R, E]
        [
            [
                [[make_counts(layer, number, rank) for rank in group] for group in groups]
                for number in range(MICRO_BATCHES)
            ]
            for layer in layers
        ]
    )
    experts = table.sum(axis=3)  # [layers, micro-batches, groups, E]
    loads = experts.reshape(*experts.shape[:3], num_ranks, -1).sum(axis=4)
    factors = (loads.max(axis=3) / loads.mean(axis=3)).mean(axis=(1, 2))
    tokens = experts.mean(axis=(1, 2))  # [layers, E]
    values = {
        "overload_factor_before": factors.max(),
        "max_tokens_before": loads.max(axis=3).mean(axis=(1, 2)).max(),
        "expert_tokens_min": tokens.min(),
        "expert_tokens_max": tokens.max(),
        "expert_tokens_std": tokens.std(axis=1).max(),
        "idle_experts": (tokens == 0).mean(),
    }
    values |= {
        f"overload_factor_before_p{percent}": np.percentile(factors, percent)
        for percent in PERCENTILES
    }
    shares = tokens / tokens.mean(axis=1, keepdims=True)
    order = sorted(np.ndindex(shares.shape), key=lambda place: -shares[place])
    for place, (layer, expert) in enumerate(order[:3], start=1):
        values |= {
            f"busiest_{place}_layer": layers[layer],
            f"busiest_{place}_expert": expert,
            f"busiest_{place}_factor": shares[layer, expert],
        }
    return {PREFIX + name: float(value) for name, value in values.items()}


def without_outlook(scalars: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in scalars.items() if "outlook" not in k and "_layer_" not in k}


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (Layout(ep=2), [[0, 1]]),
        (Layout(ep=2, dp=4), [[0, 1], [2, 3]]),
        (Layout(tp=2, ep=2, etp=2), [[0, 1, 2, 3]]),
    ],
    ids=str,
)
def test_metrics_are_what_numpy_makes_of_the_counts(layout, groups):
    llep = LLEPConfig(planner="observe")

    def work(rank: int, size: int) -> Any:
        with use_layout(layout):
            destroy_moe_metrics_tracker()
            sharers = make_sharers(llep, layout)
            install_tracker().machine = "a machine"
            observe(sharers, range(4), rank)
            line, logged = report()
            read = read_metrics(per_layer=True)
            assert report() == ("", {})
            assert read_metrics() == {}
        assert read == logged
        assert without_outlook(read) == pytest.approx(expect(range(4), groups, layout.ep))
        assert read[PREFIX + "idle_experts_layer_2"] == 1 / E
        assert read[PREFIX + "idle_experts_layer_3"] == 0
        place = "layer {0:.0f} expert {1:.0f} ({2:.1f} x mean)"
        for number in (1, 2, 3):
            named = [read[f"{PREFIX}busiest_{number}_{n}"] for n in ("layer", "expert", "factor")]
            assert place.format(*named) in line
        return line, read

    results = run_ranks(work, layout.world_size)
    assert all(each == results[0] for each in results)


def test_stages_and_what_the_outlook_says_of_them():
    """Stages have different layers, one has none; the outlook is what planners and model say."""
    layout, llep = Layout(pp=2, ep=2), LLEPConfig(planner="observe", cost_model="h100")

    def work(rank: int, size: int) -> Any:
        stage = rank // 2
        with use_layout(layout):
            destroy_moe_metrics_tracker()
            tracker = install_tracker()
            sharers = make_sharers(llep, layout)
            tracker.reducer.other_seconds = 1e-9
            assert read_metrics() == {}
            if stage == 1:
                observe(sharers, range(2), rank)
            second = read_metrics(per_layer=True)
            observe(sharers, range(2 * stage, 2 * stage + 2), rank % 2)
            both = read_metrics()
        return second, both, sharers.outlook

    results = run_ranks(without_outlook_object(work), 4)
    assert all(each == results[0] for each in results)
    second, both = results[0]
    assert without_outlook(second) == pytest.approx(expect(range(2), [[2, 3]], 2))
    assert without_outlook(both) == pytest.approx(expect(range(4), [[0, 1]], 2))

    outlook = make_outlook(make_config(Run(layout=layout)), llep)
    # Of the second stage's six forwards, in the order of layers, four are planned: two a rank.
    forwards = [(layer, number) for layer in range(2) for number in range(MICRO_BATCHES)]
    planned = [forwards[place] for place in (0, 2, 3, 5)]
    assert second[PREFIX + "outlook_planned"] == 4
    assert both[PREFIX + "outlook_planned"] == 8
    expected = look(outlook, planned, other=1e-9)
    assert {k: v for k, v in second.items() if "outlook" in k} == pytest.approx(expected)


def without_outlook_object(work: Any) -> Any:
    return lambda rank, size: work(rank, size)[:2]


def look(outlook: Outlook, planned: list[tuple[int, int]], *, other: float) -> dict[str, float]:
    """By `make_plan` and the cost model alone, of the ranks 2 and 3."""
    tables = [
        np.array([make_counts(layer, number, rank) for rank in (2, 3)]) for layer, number in planned
    ]
    plain = [make_plan(counts, max_foreign=0) for counts in tables]
    seconds = predict(outlook, plain, tables)
    others = 2 * other * np.mean([counts.sum() / 2 / 2 for counts in tables])  # both stages, top 2
    values = {
        "planned": len(planned),
        "plain_imbalance": np.mean([plan.imbalance_before for plan in plain]),
    }
    for planner in ("tolerant", "exact", "lla", "auto"):
        cost = outlook.cost if planner == "auto" else None
        plans = [make_plan(counts, planner=planner, cost=cost) for counts in tables]
        needed = predict(outlook, plans, tables)
        values |= {
            f"{planner}_imbalance": np.mean([plan.imbalance_after for plan in plans]),
            f"{planner}_lent_experts": np.mean([len(plan.transfers) for plan in plans]),
            f"{planner}_layer_gain": 100 * (1 - needed / seconds),
            f"{planner}_step_gain": 100 * 2 * (seconds - needed) / (2 * seconds + others),
        }
    return {f"{PREFIX}outlook_{name}": float(value) for name, value in values.items()}


def predict(outlook: Outlook, plans: list[Any], tables: list[np.ndarray]) -> float:
    times = [
        outlook.cost.predict(plan, counts, outlook.topology).total
        for plan, counts in zip(plans, tables, strict=True)
    ]
    return float(np.mean(times))


def test_what_is_cleared_stays_for_read():
    """As Megatron does after evaluation, when micro-batches were counted and not gathered."""
    llep = LLEPConfig(planner="observe")

    def work(rank: int, size: int) -> None:
        with use_layout(Layout(ep=2)):
            destroy_moe_metrics_tracker()
            sharers = make_sharers(llep, Layout(ep=2))
            observe(sharers, range(2), rank)
            get_moe_metrics_tracker().clear()
            assert report() == ("", {})
            assert without_outlook(read_metrics()) == pytest.approx(expect(range(2), [[0, 1]], 2))

    run_ranks(work, 2)


def test_a_report_takes_few_collectives():
    """One gathering, and over stage and pipeline two each; the first report makes one again."""
    llep = LLEPConfig(planner="observe")

    def work(rank: int, size: int) -> None:
        calls: list[str] = []
        layout = Layout(pp=2, ep=2)
        with use_layout(layout), pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "all_gather_into_tensor", "all_gather"):
                call = getattr(dist, name)

                def count(*args: Any, name: str = name, call: Any = call, **kwargs: Any) -> Any:
                    calls.append(name)
                    return call(*args, **kwargs)

                patch.setattr(dist, name, count)
            destroy_moe_metrics_tracker()
            chunks = [make_sharers(llep, layout) for _ in range(2)]  # each from a specification
            for _ in range(2):
                calls.clear()
                for number, sharers in enumerate(chunks):
                    layer = 2 * number + rank // 2
                    observe(sharers, range(layer, layer + 1), rank)
                read_metrics()
        assert calls == ["all_gather_into_tensor", *["all_reduce"] * 4]

    run_ranks(work, 4)


def test_lending_layers_log_their_experts_too():
    """Percentiles before and after, tokens of experts and the busiest."""
    counts = np.array([[30, 10, 0, 4], [10, 10, 6, 2]])

    def work(rank: int, size: int) -> Any:
        with use_layout(Layout(ep=2)):
            destroy_moe_metrics_tracker()
            install_tracker()
            config: Any = SimpleNamespace(num_layers=4)
            for number in (1, 3):
                plan = make_plan(number * counts, planner="exact")
                record_plan(
                    plan,
                    plan.load_per_rank_before,
                    layer_number=number,
                    is_mtp_layer=False,
                    config=config,
                    expert_bytes=1,
                    foreign_bytes=0,
                    plan_seconds=0.0,
                    expert_tokens=number * counts.sum(axis=0),
                )
            return report()

    line, scalars = run_ranks(work, 2)[0]
    assert scalars[PREFIX + "overload_factor_before_p50"] == pytest.approx(60 / 36)
    assert scalars[PREFIX + "overload_factor_after_p95"] == pytest.approx(1)
    assert scalars[PREFIX + "expert_tokens_max"] == 120
    assert scalars[PREFIX + "expert_tokens_min"] == 6
    assert scalars[PREFIX + "expert_tokens_std"] == pytest.approx(3 * np.std([40, 20, 6, 6]))
    assert scalars[PREFIX + "expert_tokens_max_layer_0"] == 40
    assert [scalars[f"{PREFIX}busiest_{n}_layer"] for n in (1, 2, 3)] == [0, 2, 0]
    assert " busiest experts: layer 0 expert 0 (2.2 x mean), layer 2 expert 0 (2.2 x mean)," in line
    assert "outlook" not in "".join(scalars)
