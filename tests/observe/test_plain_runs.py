"""Under `--moe-llep-planner observe` plain Megatron runs, bit for bit, and is counted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import (
    destroy_moe_metrics_tracker,
    get_moe_metrics_tracker,
)

from megatron_llep import LLEPConfig, convert_model, read_metrics, with_llep
from megatron_llep.metrics import PREFIX, install_tracker
from megatron_llep.observe.seen import SeenLayer
from support.hybrid import hybrid_run
from support.layout import Layout, use_layout
from support.metrics import report
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, TrainResult, train

OBSERVE = LLEPConfig(planner="observe")
HOT = Routing("hot")
RUNS = {
    "alltoall": Run(layout=Layout(ep=2), routing=HOT),
    "allgather": Run(
        layout=Layout(ep=2), routing=HOT, config={"moe_token_dispatcher_type": "allgather"}
    ),
}
PIPELINE = {"pp2": Run(layout=Layout(pp=2, ep=2), routing=HOT)}
SLOW_RUNS = {
    "tp2-ep2": Run(layout=Layout(tp=2, ep=2, etp=1, dp=2), routing=HOT),
    "etp2": Run(layout=Layout(tp=2, ep=2, etp=2), routing=HOT),
    "vpp2": Run(layout=Layout(pp=2, vpp=2, ep=2), routing=HOT, config={"num_layers": 4}),
    "recompute": Run(
        layout=Layout(ep=2, dp=4),
        routing=HOT,
        config={
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "mtp": Run(
        layout=Layout(ep=2, dp=4), routing=HOT, config={"mtp_num_layers": 1}, micro_batches=4
    ),
    "overlap": Run(
        layout=Layout(ep=2, dp=4),
        routing=HOT,
        ddp={"overlap_grad_reduce": True, "use_distributed_optimizer": True},
        optimizer={"optimizer": "adam", "lr": 1e-3},
    ),
}


def assert_equal(mine: TrainResult, plain: TrainResult) -> None:
    assert mine.losses == plain.losses
    assert mine.gradient_norms == plain.gradient_norms
    for name in ("gradients", "parameters", "buffers", "optimizer_state"):
        ours, theirs = getattr(mine, name), getattr(plain, name)
        assert ours.keys() == theirs.keys()
        for key, expected in theirs.items():
            assert torch.equal(ours[key], expected), f"{name}: {key}"


def note_what_runs(chunks: Chunks) -> list[Any]:
    """Kinds of layers and of their dispatchers, and the forwards that were seen."""
    kinds = {
        (type(layer), type(layer.token_dispatcher))
        for chunk in chunks
        for layer in chunk.modules()
        if isinstance(layer, MoELayer)
    }
    seen: list[SeenLayer] = []
    tracker = get_moe_metrics_tracker()
    if hasattr(tracker, "on_seen"):
        tracker.on_seen.append(seen.append)
        read_metrics()
        tracker.on_seen.clear()
    return [kinds, seen]


def observe(run: Run, seam: str) -> TrainResult:
    install_tracker()
    read_metrics()
    if seam == "spec":
        return train(
            run, transform_spec=lambda spec: with_llep(spec, OBSERVE), observe=note_what_runs
        )
    return train(
        run, transform_model=lambda chunks: convert_model(chunks, OBSERVE), observe=note_what_runs
    )


def compare(run: Run) -> None:
    """On this rank's world, through both seams."""
    with use_layout(run.layout):
        plain = train(run, observe=note_what_runs)
        for seam in ("model", "spec"):
            if seam == "spec" and run.config.get("mtp_num_layers"):
                continue  # Megatron makes those layers by itself
            observed = observe(run, seam)
            assert_equal(observed, plain)
            assert observed.observed[0] == plain.observed[0], "layers are Megatron's own"
            check_seen(run, observed.observed[1])


def check_seen(run: Run, seen: list[SeenLayer]) -> None:
    """Every micro-batch of training once, in order, with all its tokens."""
    layout = run.layout
    forwards = run.steps * run.micro_batches // layout.data_parallel
    layers = sorted({each.layer for each in seen})
    assert layers
    assert [(each.layer, each.micro_batch) for each in seen] == [
        (layer, number) for layer in layers for number in range(forwards)
    ]
    tokens = run.micro_batch_size * run.sequence_length // layout.tp
    sources = layout.ep * layout.expert_tp
    for each in seen:
        assert each.plan is None
        assert each.counts.shape == (layout.ep, 8)
        assert each.counts.dtype == np.int64
        assert each.counts.sum() == tokens * sources * 2


def compare_all(runs: dict[str, Run]) -> None:
    (size,) = {run.layout.world_size for run in runs.values()}

    def work(rank: int, size: int) -> None:
        for name, run in runs.items():
            try:
                compare(run)
            except BaseException as error:
                error.add_note(f"case: {name}")
                raise

    run_ranks(work, size, timeout=240)


@pytest.mark.parametrize("runs", [RUNS, PIPELINE], ids=["two ranks", "two stages"])
def test_bit_for_bit(runs):
    compare_all(runs)


@pytest.mark.slow
def test_bit_for_bit_in_other_layouts():
    compare_all(SLOW_RUNS)


def test_layers_of_all_stages_and_of_multi_token_prediction():
    """Numbered over the whole hybrid model, by both seams; the same on ranks of all stages."""
    pattern = "*E|*E/*E/*E"

    def work(rank: int, size: int) -> Any:
        run = hybrid_run(pattern, layout=Layout(pp=2, ep=2), routing=HOT, steps=1)
        scalars = []
        with use_layout(run.layout):
            for settings in (
                {"transform_model": lambda chunks: convert_model(chunks, OBSERVE)},
                {"transform_spec": lambda spec: with_llep(spec, OBSERVE)},
            ):
                destroy_moe_metrics_tracker()
                train(run, **settings)
                scalars.append(read_metrics(per_layer=True))
        for each in scalars:
            prefix = f"{PREFIX}overload_factor_before_layer_"
            layers = {int(name.removeprefix(prefix)) for name in each if prefix in name}
            assert layers == {1, 3, 5, 7}
            assert each[PREFIX + "overload_factor_before"] > 1.2
        by_model, by_spec = scalars
        assert {name for name in by_model if name not in by_spec} == {
            f"{PREFIX}outlook_{planner}_step_gain" for planner in ("tolerant", "exact", "lla")
        }, "of a specification the rest of the model is not known"
        return scalars

    results = run_ranks(work, 4, timeout=120)
    assert all(each == results[0] for each in results)


def test_evaluation_is_not_counted_and_forwards_are_not_counted_twice():
    run = replace(RUNS["alltoall"], steps=1)

    def twice(chunks: Chunks) -> None:
        convert_model(chunks, OBSERVE)
        convert_model(chunks, OBSERVE)

    def evaluate(chunks: Chunks) -> dict[str, float]:
        (model,) = chunks
        counted = read_metrics()
        tokens = torch.zeros(1, run.sequence_length, dtype=torch.long)
        with torch.no_grad():
            model(tokens, tokens, None, labels=tokens)
        model.eval()
        model(tokens, tokens, None, labels=tokens)
        assert report() != ("", {})  # what training did
        assert report() == ("", {})
        assert read_metrics() == {}
        return counted

    def work(rank: int, size: int) -> None:
        with use_layout(run.layout):
            destroy_moe_metrics_tracker()
            counted = train(run, transform_model=twice, observe=evaluate).observed
        mean = run.micro_batch_size * run.sequence_length * 2
        assert counted[PREFIX + "max_tokens_before"] == pytest.approx(
            mean * counted[PREFIX + "overload_factor_before"]
        )

    run_ranks(work, 2)


def test_one_expert_parallel_rank_is_counted_and_has_nobody_to_lend_to():
    run = Run(layout=Layout(dp=2), routing=HOT, steps=1)

    def work(rank: int, size: int) -> dict[str, float]:
        with use_layout(run.layout):
            plain = train(run)
            destroy_moe_metrics_tracker()
            observed = train(
                run,
                transform_model=lambda chunks: convert_model(chunks, OBSERVE),
                observe=lambda _: read_metrics(),
            )
        assert_equal(observed, plain)
        return observed.observed

    first, second = run_ranks(work, 2)
    assert first == second
    assert first[PREFIX + "overload_factor_before"] == 1
    assert first[PREFIX + "busiest_1_factor"] == pytest.approx(8 / 2)  # every token has it
    assert not any("outlook" in name for name in first)
