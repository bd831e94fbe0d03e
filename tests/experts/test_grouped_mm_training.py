"""Training with grouped GEMMs and lending equals plain Megatron's `SequentialMLP`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from layer.test_layer_float64 import T, compare_layers
from megatron_llep.experts.grouped_linear import view_as_one
from megatron_llep.experts.grouped_mm import GroupedMM
from megatron_llep.integration.convert import convert_model
from support.layout import Layout, use_layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, build_model, make_config, train

GROUPED = replace(EAGER, expert_gemm="grouped_mm")
REFETCHED = replace(GROUPED, foreign_weights="refetch")
HOT = Routing("hot")
OVERLAPPED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


# A large eps: Adam's steps would hide the gradients' scale.
DISTRIBUTED = {
    "ddp": OVERLAPPED,
    "optimizer": {"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5},
}


def freeze_some(chunks: Chunks) -> None:
    for name, parameter in chunks[0].named_parameters():
        frozen = "local_experts.1." in name or ("layers.1" in name and "linear_fc1" in name)
        parameter.requires_grad_(not frozen)


def case(layout: Layout, llep=GROUPED, **run: Any) -> Case:
    return Case(Run(**{"layout": layout, "routing": HOT, **run}), llep)


TWO_RANKS = {
    "kept": case(Layout(ep=2)),
    "refetched": case(Layout(ep=2), REFETCHED),
    "distributed optimizer": case(Layout(ep=2), REFETCHED, **DISTRIBUTED),
    "biases": case(Layout(ep=2), REFETCHED, config={"add_bias_linear": True}),
    "recomputed": case(
        Layout(ep=2), config={"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    ),
    "fully recomputed": case(
        Layout(ep=2),
        config={
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "one rank without tokens": case(Layout(ep=2), routing=Routing("one_rank"), prepare=freeze_some),
    "nothing lent at times": case(
        Layout(ep=2),
        replace(GROUPED, imbalance_threshold=1.1),
        routing=Routing("natural"),
        **DISTRIBUTED,
    ),
}

FOUR_RANKS = {
    "replicas": case(Layout(ep=2, dp=4), micro_batches=8, routing=Routing("natural")),
    "replicas, all overlapped": case(
        Layout(ep=2, dp=4), REFETCHED, micro_batches=8, steps=3, **DISTRIBUTED
    ),
    "expert tensor parallelism": case(Layout(tp=2, ep=2, etp=2), REFETCHED),
    "pipeline": case(Layout(pp=2, ep=2)),
}


@pytest.mark.parametrize("cases", [TWO_RANKS, FOUR_RANKS], ids=["2 ranks", "4 ranks"])
def test_losses_gradients_and_optimizer_state(cases):
    compare_all(cases, timeout=120)


def test_parameters_that_are_still_being_gathered():
    """Nothing is lent, so only the experts' own forward waits for their weights."""

    def work(rank, size):
        settings = DISTRIBUTED | {"ddp": OVERLAPPED | {"bucket_size": 1}}
        run = Run(layout=Layout(ep=2, dp=4), steps=3, routing=Routing("balanced"), **settings)
        ours = train_with_llep(run, GROUPED)
        assert ours.observed.fallbacks == ours.observed.plans
        assert_same_run(ours, train(run))

    run_ranks(work, 4)


@pytest.mark.parametrize(
    ("layout", "token_counts", "settings"),
    [
        (Layout(ep=4), [T, 4, 1, 3 * T], {}),
        (Layout(tp=2, ep=2, etp=2), [T] * 4, {}),
        (Layout(ep=2), [T, T], {"add_bias_linear": True}),
    ],
    ids=["ragged tokens", "expert tensor parallelism", "biases"],
)
def test_a_layer_in_float64(layout, token_counts, settings):
    size = layout.world_size
    assert all(run_ranks(compare_layers, size, layout, GROUPED, 1.0, token_counts, settings))


def find_experts(chunks: Chunks) -> list[SequentialMLP]:
    return [module for module in chunks[0].modules() if isinstance(module, SequentialMLP)]


@pytest.mark.parametrize(
    ("settings", "in_place"),
    [({}, True), (DISTRIBUTED, False)],
    ids=["DDP", "distributed optimizer"],
)
def test_where_weights_are_multiplied_where_they_lie(settings, in_place):
    """Not in the distributed optimizer's buffer, as the docs say."""

    def work(rank, size):
        def convert(chunks: Chunks) -> None:
            convert_model(chunks, GROUPED)

        def look(chunks: Chunks) -> list[bool]:
            experts = find_experts(chunks)
            assert all(type(each) is GroupedMM for each in experts)
            return [
                view_as_one([one.linear_fc1.weight for one in each.local_experts]) is not None
                for each in experts
            ]

        run = Run(layout=Layout(ep=2), steps=1, **settings)
        found = train(run, transform_model=convert, observe=look).observed
        assert found == [in_place, in_place]

    run_ranks(work, 2)


def test_the_number_of_gemms(monkeypatch):
    calls: list[tuple] = []
    grouped_mm = torch.nn.functional.grouped_mm

    def count(rows: torch.Tensor, other: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append((rows.shape, other.shape))
        return grouped_mm(rows, other, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", count)

    def work(rank, size):
        run = Run(layout=Layout(ep=2), routing=HOT, steps=1, micro_batches=2)
        result = train_with_llep(run, GROUPED)
        assert result.observed.fallbacks == 0
        layers = run.micro_batches // 2 * 2
        native = [b for _, b in calls if b[0] == 4 and len(b) == 3]
        assert len(native) == 4 * layers  # two linears, forward and gradient of the rows
        # The hot expert of layer 1 is on rank 0, that of layer 2 too: rank 1 borrows.
        foreign = [b for _, b in calls if b[0] < 4 and len(b) == 3]
        assert len(foreign) == (4 * layers if rank == 1 else 0)
        assert len(calls) == 3 * (len(native) + len(foreign)) // 2

    run_ranks(work, 2)


def test_checkpoints_are_megatrons():
    def work(rank, size):
        run = Run(layout=Layout(ep=2), steps=1)
        with use_layout(run.layout):
            plain, grouped = (build_model(make_config(run), run)[0] for _ in range(2))
            convert_model([grouped], GROUPED)
            with torch.no_grad():
                for parameter in grouped.parameters():
                    parameter.add_(1)
            state = grouped.state_dict()
            assert list(state) == list(plain.state_dict())
            # The order too: the distributed optimizer saves its state in that of the parameters.
            assert [name for name, _ in grouped.named_parameters()] == [
                name for name, _ in plain.named_parameters()
            ]
            plain.load_state_dict(state)
            for mine, theirs in zip(grouped.parameters(), plain.parameters(), strict=True):
                assert torch.equal(mine, theirs)
            sharded = [model.sharded_state_dict() for model in (plain, grouped)]
            assert sharded[0].keys() == sharded[1].keys()
            for name, entry in sharded[0].items():
                other = sharded[1][name]
                assert (entry.key, entry.replica_id) == (other.key, other.replica_id)
            fresh = build_model(make_config(run), run)[0]
            convert_model([fresh], GROUPED)
            fresh.load_state_dict(plain.state_dict())
            for mine, theirs in zip(fresh.parameters(), plain.parameters(), strict=True):
                assert torch.equal(mine, theirs)
            for experts in find_experts([fresh]):
                assert view_as_one([one.linear_fc2.weight for one in experts.local_experts])[
                    0
                ].equal(experts.local_experts[0].linear_fc2.weight)

    run_ranks(work, 2)
