"""Metrics for loops that log by themselves, and buffers that go before an export."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_llep import convert_model, read_metrics, release_buffers
from megatron_llep.metrics import METRICS, PREFIX, install_tracker, record_plan
from megatron_llep.planner import make_plan
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.metrics import report
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.training import Run, build_model, make_config, make_tokens

CONFIG: Any = SimpleNamespace(num_layers=6)
RUN = Run(layout=Layout(ep=2), routing=Routing("hot"))
COUNTS = np.array([[30, 10], [10, 10]])
"""40 tokens for the expert of rank 0, 20 for that of rank 1."""


def record(layer_number: int, foreign_mib: int) -> None:
    plan = make_plan(COUNTS, planner="exact", imbalance_threshold=1.0, min_tokens_per_gemm=1)
    record_plan(
        plan,
        COUNTS.sum(axis=0),
        layer_number=layer_number,
        is_mtp_layer=False,
        config=CONFIG,
        expert_bytes=2**20,
        foreign_bytes=foreign_mib * 2**20,
        plan_seconds=1e-3,
    )


def test_two_readers_of_which_neither_takes_from_the_other():
    def work(rank, size):
        with use_layout(RUN.layout):
            assert read_metrics() == {}  # Megatron's own tracker
            install_tracker()
            assert read_metrics() == {}
            record(2, rank + 1)
            record(5, 5)
            _, logged = report()
            assert read_metrics(per_layer=True) == logged  # though Megatron has forgotten
            assert read_metrics() == {}
            record(2, 3)
            first = read_metrics()
            assert first.keys() == {PREFIX + metric.name for metric in METRICS}
            assert first[PREFIX + "foreign_mib"] == 3
            record(2, 1)
            record(2, 4)
            get_moe_metrics_tracker().clear()  # as after evaluation
            assert report() == ("", {})
            both = read_metrics()
            assert both[PREFIX + "foreign_mib"] == 4
            assert both[PREFIX + "lent_experts"] == first[PREFIX + "lent_experts"] == 1
            return logged

    first, second = run_ranks(work, 2)
    assert first == second


def test_the_groups_may_be_the_models_own():
    def work(rank, size):
        with use_layout(RUN.layout):
            install_tracker()
            groups: Any = SimpleNamespace(
                tp_dp_cp=torch.distributed.group.WORLD,
                pp=parallel_state.get_pipeline_model_parallel_group(),
            )
        record(1, rank + 1)
        with pytest.raises(ValueError, match="pg_collection"):
            read_metrics()
        assert read_metrics(groups)[PREFIX + "foreign_mib"] == 2

    run_ranks(work, 2)


def test_in_a_loop_of_ones_own():
    """Whatever was released is made anew, and nothing else changes."""

    def work(rank, size):
        with use_layout(RUN.layout):
            losses: dict[bool, list[float]] = {}
            for releases in (False, True):
                (model,) = convert_model(build_model(make_config(RUN), RUN), EAGER)
                force_routing([model], RUN.routing)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                losses[releases] = []
                for step in range(3):
                    tokens = make_tokens(RUN, step, rank)
                    inputs, labels = tokens[:, :-1], tokens[:, 1:]
                    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
                    loss = model(inputs, positions, None, labels=labels).mean()
                    loss.backward()
                    optimizer.step()
                    losses[releases].append(loss.item())
                    metrics = read_metrics()
                    assert metrics[PREFIX + "lent_experts"] >= 1
                    before = metrics[PREFIX + "overload_factor_before"]
                    assert metrics[PREFIX + "overload_factor_after"] < before
                    if releases:
                        assert (release_buffers([model]) > 0) == (rank > 0)
                        assert release_buffers(model) == 0
            assert losses[True] == losses[False]
            (plain,) = build_model(make_config(RUN), RUN)
            assert release_buffers(plain) == 0

    run_ranks(work, 2)
