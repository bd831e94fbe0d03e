"""Experts lent to several ranks, in shards: the same training as plain Megatron's, and as direct
lending's; the same bits in a second run; and the bytes that the formula says.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_logging import (
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)

from layer.test_layer_float64 import T, compare_layers
from megatron_llep.integration.convert import convert_model
from megatron_llep.metrics import PREFIX, LLEPMetricsTracker
from megatron_llep.planner.cost.traffic import count_lending
from megatron_llep.planner.topology import ONE_NODE
from support.layout import Layout
from support.llep import EAGER, assert_same_run, note_decisions, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing
from support.spread import use_spread_experts
from support.training import Run, train

# 5 * 32 * 3 numbers: shards of two and of three are uneven.
UNEVEN = {"moe_ffn_hidden_size": 5}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
BF16_OPTIMIZER = {"bf16": True, "params_dtype": torch.bfloat16}


def compare_spread_layers(rank, size, layout, llep, settings):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_spread_experts(monkeypatch)
        return compare_layers(rank, size, layout, llep, 0.0, [T] * size, settings)


@pytest.mark.parametrize("scatter_from", [0, 2, 3])
@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
def test_layer_in_float64(scatter_from, foreign_weights):
    llep = replace(EAGER, scatter_from=scatter_from, foreign_weights=foreign_weights)
    settings = {"moe_ffn_hidden_size": 25, "add_bias_linear": foreign_weights == "keep"}
    slots = run_ranks(compare_spread_layers, 4, Layout(ep=4), llep, settings)
    assert slots == [4] * 4  # the last rank borrows 2 of rank 0, 1 of rank 1 and 1 of rank 2


def test_layer_with_expert_tensor_parallelism():
    layout, llep = Layout(tp=2, ep=4, etp=2), replace(EAGER, scatter_from=2)
    assert run_ranks(compare_spread_layers, 8, layout, llep, {}, timeout=120) == [4] * 8


def test_layer_on_four_nodes():
    """From the home, between nodes, inside nodes: three exchanges."""
    llep = replace(EAGER, scatter_from=2, ranks_per_node=2)
    assert max(run_ranks(compare_spread_layers, 8, Layout(ep=8), llep, {}, timeout=120)) > 0


def train_spread(run, **settings):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_spread_experts(monkeypatch)
        return train_with_llep(run, replace(EAGER, **settings))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        BF16,
    ],
    ids=["fp32", "recompute", "bf16"],
)
def test_training(config):
    """In bf16 the router of plain Megatron would be near ties; direct lending computes the same."""
    is_bf16 = "bf16" in config
    run = Run(
        layout=Layout(ep=4),
        routing=Routing("balanced" if is_bf16 else "natural", 4),
        config={**UNEVEN, **config},
        ddp={"overlap_grad_reduce": True},
        optimizer=BF16_OPTIMIZER if is_bf16 else {},
    )

    def work(rank, size):
        direct = train_spread(run, scatter_from=0)
        scattered = train_spread(run, scatter_from=2)
        again = train_spread(run, scatter_from=2)
        assert scattered.observed == direct.observed
        assert scattered.observed.transfers == 9 * scattered.observed.plans
        for name, gradient in scattered.gradients.items():
            assert torch.equal(gradient, again.gradients[name]), f"{name}: other bits"
        tolerance = {"loss_tolerance": 5e-3, "gradient_tolerance": 2e-2} if is_bf16 else {}
        assert_same_run(scattered, direct, **tolerance)
        if not is_bf16:
            assert_same_run(scattered, train(run))
            mixed = train_spread(run, scatter_from=3, foreign_weights="refetch")
            assert_same_run(mixed, direct)

    run_ranks(work, 4, timeout=120)


MEASURED = Run(layout=Layout(ep=4), steps=2, micro_batches=8, config=UNEVEN)


@pytest.mark.parametrize("scatter_from", [0, 2, 3])
@pytest.mark.parametrize(
    ("foreign_weights", "grad_dtype"), [("keep", "fp32"), ("refetch", "param")]
)
def test_bytes_handed_to_the_collectives(scatter_from, foreign_weights, grad_dtype):
    """Measured, per rank and layer, they are the formula's; and the metric is the busiest's."""
    llep = replace(
        EAGER, scatter_from=scatter_from, foreign_weights=foreign_weights, grad_dtype=grad_dtype
    )
    run = replace(
        MEASURED,
        config=UNEVEN | BF16,
        optimizer=BF16_OPTIMIZER,
        routing=Routing("balanced", 4),
    )
    weights_travel = 2 if foreign_weights == "refetch" else 1
    gradient_bytes = 4 if grad_dtype == "fp32" else 2

    def work(rank, size):
        decisions, handed = [], []

        def note_exchange(monkeypatch):
            exchange = torch.distributed.all_to_all_single

            def note(incoming, outgoing, *args, group=None, **kwargs):
                if group is not None and group.group_desc == "LLEP_LENDING":
                    handed.append((outgoing.nbytes, incoming.nbytes))
                return exchange(incoming, outgoing, *args, group=group, **kwargs)

            monkeypatch.setattr(torch.distributed, "all_to_all_single", note)

        def convert(chunks):
            convert_model(chunks, llep)
            handed.clear()  # what its ranks exchange as the group is made
            note_decisions(chunks, decisions)

        tracker = LLEPMetricsTracker()
        before = get_moe_metrics_tracker()
        with pytest.MonkeyPatch.context() as monkeypatch:
            use_spread_experts(monkeypatch)
            note_exchange(monkeypatch)
            set_moe_metrics_tracker(tracker)
            logged = {}
            tracker._log_scalars = lambda scalars, *_: logged.update(scalars)
            try:
                train(run, transform_model=convert, observe=lambda _: report(tracker))
            finally:
                set_moe_metrics_tracker(before)

        width = 3 * 32 * UNEVEN["moe_ffn_hidden_size"]
        expected = np.zeros((2, size), dtype=np.int64)
        for decision in decisions:
            for each in count_lending(decision.plan, width, scatter_from, ONE_NODE):
                numbers = each.numbers[0]
                expected += 2 * weights_travel * numbers + gradient_bytes * numbers[::-1]
        assert len(decisions) == 2 * 2 * 2  # steps, micro-batches a rank, layers
        assert np.sum(handed, axis=0).tolist() == expected[:, rank].tolist()
        # The sum over both layers, and all plans of a layer are alike in what they lend.
        mib = expected.max() / 2**20 / (len(decisions) / 2)
        assert logged[PREFIX + "lent_link_mib"] == pytest.approx(mib, rel=1e-6)

    run_ranks(work, 4)


def report(tracker):
    tracker.report(1.0, 1, num_layers=2, moe_layer_freq=1, track_names=[], force_initialize=False)
