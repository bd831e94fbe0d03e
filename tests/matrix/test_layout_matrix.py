"""Every parallel layout, crossed with what the optimizer, recompute and lending can do."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from covering import Row, cover_pairs

from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all
from support.routing import Routing
from support.training import Run

# Megatron's distributed optimizer takes Adam alone; a large epsilon keeps the gradient's scale.
ADAM = {"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5}
# At a high rate, 20 steps of a deep model amplify rounding to more than the tolerance: with Adam's
# above, weights that are 1e-7 apart give plain Megatron norms that are 1e-5 apart in 4 stages.
SGD: dict[str, Any] = {"lr": 0.01}
CALM_ADAM = ADAM | {"lr": 0.1}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}

LAYOUTS = [
    Layout(ep=2),
    Layout(tp=2, ep=2, etp=1),
    Layout(ep=4),
    Layout(ep=2, dp=4),
    Layout(tp=2, ep=2, etp=2),
    Layout(tp=2, ep=4, etp=1),
    Layout(tp=4, ep=2, etp=2),
    Layout(ep=2, etp=2),
    Layout(pp=2, ep=2),
    Layout(pp=2, vpp=2, ep=2),
    Layout(tp=2, pp=2, vpp=2, ep=2, etp=1),
    Layout(ep=8),
    Layout(ep=4, dp=8),
    Layout(tp=2, ep=2, etp=1, dp=4),
    Layout(tp=2, ep=4, etp=2),
    Layout(pp=4, ep=2),
    Layout(pp=2, ep=4),
    Layout(tp=2, pp=2, ep=2, etp=2),
    Layout(tp=2, pp=2, vpp=2, ep=4, etp=1),
]


def make_run(layout: Layout, **settings: Any) -> Run:
    """A run with layers for every stage, and two micro-batches for each data-parallel rank."""
    stages = layout.pp * (layout.vpp or 1)
    config = {"num_layers": max(2, stages)} | settings.pop("config", {})
    per_rank = settings.pop("micro_batches_per_rank", 2)
    return Run(
        layout=layout,
        micro_batches=max(per_rank, layout.pp) * layout.data_parallel,
        config=config,
        **settings,
    )


def make_cases(layout: Layout, steps: int) -> dict[str, Case]:
    return {
        f"{pattern}, {optimizer.get('optimizer', 'sgd')}": Case(
            make_run(
                layout,
                routing=Routing(pattern, ranks=layout.ep),
                optimizer=optimizer,
                steps=steps,
            )
        )
        for pattern, optimizer in [("natural", SGD), ("hot", CALM_ADAM if layout.pp > 2 else ADAM)]
    }


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2, pp=2, vpp=2, ep=2, etp=1), Layout(tp=2, ep=4, etp=1), Layout(ep=2, etp=2)],
    ids=str,
)
def test_some_layouts(layout):
    compare_all(make_cases(layout, steps=3))


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(layout):
    compare_all(make_cases(layout, steps=20), timeout=600)


FACTORS = {
    "optimizer": ["sgd", "adam", "distributed"],
    "overlap": ["none", "grad", "grad and param"],
    "dtype": ["fp32", "bf16"],
    "clip": [1e6, 0.1],
    "micro_batches": [1, 4],
    "recompute": ["none", "full uniform", "full block", "moe", "core_attn"],
    "foreign_weights": ["keep", "refetch"],
    "routing": ["natural", "hot", "starved"],
    "planner": ["tolerant", "exact", "lla"],
    "model": ["plain", "shared experts", "biases"],
    "expert_gemm": ["megatron", "grouped_mm"],
    "scatter_from": [2, 3],
}
# Small buckets: a layer's experts lie in several, as those of large models do.
OVERLAPS = {
    "none": {},
    "grad": {"overlap_grad_reduce": True, "bucket_size": 5000},
    "grad and param": {
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "bucket_size": 5000,
    },
}
RECOMPUTES = {
    "none": {},
    "full uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}
MODELS = {
    "plain": {},
    "shared experts": {
        "moe_shared_expert_intermediate_size": 32,
        "moe_shared_expert_overlap": True,
    },
    "biases": {"add_bias_linear": True},
}


def is_allowed(row: Row) -> bool:
    """Whether Megatron has this combination, and plain and LLEP runs can be compared in it."""
    if row["overlap"] == "grad and param" and row["optimizer"] != "distributed":
        return False
    # In bf16 near ties of the router's own choice go either way.
    return not (row["dtype"] == "bf16" and row["routing"] == "natural")


def make_case(layout: Layout, row: Row, steps: int) -> Case:
    """The run that a row of the covering sample describes."""
    of_llep = ("planner", "foreign_weights", "expert_gemm", "scatter_from")
    llep = replace(EAGER, **{name: row[name] for name in of_llep})
    if row["dtype"] == "fp32":
        return Case(make_run_of(layout, row, steps), llep)
    # Rounding adds up, the more so the longer the steps: after 4 of Adam's at its rate in fp32,
    # plain Megatron's own gradients in bf16 are 0.2 from those in fp32.
    return Case(
        make_run_of(layout, row, 2, is_low_rate=True),
        llep,
        loss_tolerance=5e-3,
        gradient_tolerance=5e-2,
        exact=make_run_of(layout, row | {"dtype": "fp32"}, 2, is_low_rate=True),
    )


def make_run_of(layout: Layout, row: Row, steps: int, *, is_low_rate: bool = False) -> Run:
    """The row's run, without the settings of LLEP."""
    is_bf16 = row["dtype"] == "bf16"
    optimizer = (SGD if row["optimizer"] == "sgd" else ADAM) | {"clip_grad": row["clip"]}
    if is_bf16:
        optimizer |= {"bf16": True, "params_dtype": torch.bfloat16}
    if is_low_rate:
        optimizer |= {"lr": 0.01}
    return make_run(
        layout,
        routing=Routing(row["routing"], ranks=layout.ep),
        optimizer=optimizer,
        steps=steps,
        micro_batches_per_rank=row["micro_batches"],
        ddp=OVERLAPS[row["overlap"]]
        | {"use_distributed_optimizer": row["optimizer"] == "distributed"},
        config=RECOMPUTES[row["recompute"]] | MODELS[row["model"]] | (BF16 if is_bf16 else {}),
    )


ROWS = cover_pairs(FACTORS, is_allowed)


def make_sample(layout: Layout, rows: list[Row], steps: int) -> dict[str, Case]:
    if layout.expert_tp > 1:  # where Megatron has no biases
        rows = [row | {"model": row["model"].replace("biases", "plain")} for row in rows]
    return {str(row): make_case(layout, row, steps) for row in rows}


def test_the_sample_covers_all_pairs():
    for a, b in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            impossible = {(a, x), (b, y)} in (
                {("overlap", "grad and param"), ("optimizer", "sgd")},
                {("overlap", "grad and param"), ("optimizer", "adam")},
                {("dtype", "bf16"), ("routing", "natural")},
            )
            assert impossible != any(row[a] == x and row[b] == y for row in ROWS)
    assert len(ROWS) < 30


def test_some_modes():
    # Expert data parallelism: what is reduced too early, or lent stale, shows from step 2 on.
    compare_all(make_sample(Layout(ep=2, dp=4), ROWS[:4], steps=3))


# A process keeps the threads of every group it made: a few cases each.
CASES_PER_PROCESS = 5
SAMPLES = {
    Layout(ep=2, dp=4): ROWS,
    Layout(tp=2, ep=2, etp=2): ROWS[0::2],
    Layout(pp=2, vpp=2, ep=2): ROWS[1::2],
    Layout(tp=2, pp=2, vpp=2, ep=2, etp=1): ROWS[0::3],
    Layout(ep=4, dp=8): ROWS[1::4],
    Layout(tp=2, pp=2, ep=2, etp=2): ROWS[2::4],
}
BATCHES = [
    (layout, rows[start : start + CASES_PER_PROCESS])
    for layout, rows in SAMPLES.items()
    for start in range(0, len(rows), CASES_PER_PROCESS)
]


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("layout", "rows"), BATCHES, ids=lambda value: "" if isinstance(value, list) else str(value)
)
def test_every_mode(layout, rows):
    compare_all(make_sample(layout, rows, steps=4), timeout=600)
