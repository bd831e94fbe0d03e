"""Experts whose parameters are quantised (`--fp8-param-gather`): they are lent as they are.

STAND-INS: the quantisers, the transpose, and GEMMs over the numbers in fp32 (`te_quantised`). The
tensor classes, and the module that computes with them, are TE's own.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformer_engine.pytorch")

from megatron.core import fp8_utils
from megatron.core.optimizer import distrib_optimizer
from te_cpu_stand_in import make_fp8_recipe
from te_experts import TE_CONFIG, use_te_experts
from te_quantised import (
    RECIPES,
    Recipe,
    install_quantised,
    quantise,
    quantise_experts,
    quantise_from_shards,
    read_numbers,
)
from transformer_engine.pytorch import DType
from transformer_engine.pytorch import tensor as te

from megatron_llep.config import LLEPConfig
from megatron_llep.experts.quantised import check_lendable
from megatron_llep.integration.convert import convert_model
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.lending.loan import WeightLoan
from megatron_llep.lending.nodes import lend
from megatron_llep.lending.parcel import Parcel
from megatron_llep.lending.shared import SharedLending
from megatron_llep.lending.trained import find_trained
from megatron_llep.planner.plan import plan_from_quota
from support.layout import Layout
from support.llep import EAGER, assert_same_run, note_decisions
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, _forward_step, train

pytestmark = pytest.mark.te

INNER = {
    "tensorwise": ("_data", "_scale_inv"),
    "blockwise": ("_rowwise_data", "_rowwise_scale_inv"),
    "mxfp8": (
        "_rowwise_data",
        "_rowwise_scale_inv",
        "_columnwise_data",
        "_columnwise_scale_inv",
    ),
}
SHAPES = ((96, 64), (64, 160))
PARCEL = {
    # Data, and scales: one, those of blocks of 128 x 128 in rows of 4, those of blocks of 32 for
    # which rows are padded to [128, 4] and columns to [4, 128]. Each starts at 128 bytes.
    "tensorwise": 96 * 64 + 128 + 64 * 160 + 128,
    "blockwise": 96 * 64 + 128 + 64 * 160 + 128,
    "mxfp8": 2 * 96 * 64 + 128 * 4 + 4 * 128 + 2 * 64 * 160 + 128 * 8 + 4 * 256,
}


@pytest.fixture(autouse=True)
def quantised(monkeypatch, gemms):
    install_quantised(monkeypatch)
    # Inputs by scales that do not depend on the tokens that share a slot.
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: make_fp8_recipe(64.0))


def make_expert(expert: int, recipe: Recipe, *, bias: bool = False) -> tuple[torch.Tensor, ...]:
    """Two weights, and biases if wanted."""
    generator = torch.Generator().manual_seed(expert)
    weights = []
    for rows, columns in SHAPES:
        matrix = torch.randn(rows, columns, generator=generator)
        weights.append(torch.nn.Parameter(quantise(matrix.bfloat16(), recipe)))
        if bias:
            bias_numbers = torch.randn(rows, generator=generator).bfloat16()
            weights.append(torch.nn.Parameter(bias_numbers))
    return tuple(weights)


def lend_to_all(rank: int, size: int, recipe: Recipe, **settings: Any) -> dict:
    """Expert 0 goes to all other ranks, two experts on each: what each is lent, and the bytes."""
    natives = [make_expert(2 * rank + i, recipe, bias=settings["bias"]) for i in range(2)]
    if settings["drop_columns"] and rank == 0:
        for weight in natives[0]:
            if fp8_utils.is_float8tensor(weight):
                weight.update_usage(rowwise_usage=True, columnwise_usage=False)
    quota = np.zeros((2 * size, size), dtype=np.int64)
    quota[0] = 1
    quota[np.arange(2, 2 * size), np.arange(2, 2 * size) // 2] = 1
    noted: list[tuple[int, int]] = []
    loan = WeightLoan(
        plan_from_quota(quota),
        natives,
        group=dist.group.WORLD,
        scatter_from=settings["scatter_from"],
        grad_dtype=torch.float32,
        trains=find_trained(natives),
        refetch=settings["refetch"],
        shared=SharedLending(),
        note_bytes=lambda *both: noted.append(both),
    )
    loan.start_fetch()
    held = loan._shared.memory.alive
    rows = torch.zeros(1, 4, requires_grad=True)
    rows, foreign = lend(loan, rows)
    if settings["refetch"]:
        loan.free_weights()
        assert loan._shared.memory.alive == 0
        loan.start_fetch()
        loan.finish_fetch()
    home = make_expert(0, recipe, bias=settings["bias"])
    for expert in foreign:
        for mine, lent in zip(home, expert, strict=True):
            assert_is_lent(mine, lent, recipe, columns=not settings["drop_columns"])
    loan.open_grads()
    if foreign:
        for i, weight in enumerate(foreign[0]):
            assert weight.main_grad.dtype == torch.float32
            numbers = torch.arange(weight.numel(), dtype=torch.float32).view(weight.shape)
            weight.main_grad.add_(rank * (numbers + i))
    loan.drop_weights()
    for weight in (each for expert in foreign for each in expert):
        made = getattr(weight, "_transpose", getattr(weight, "_columnwise_data", None))
        assert made is None or recipe == "mxfp8", "what TE made lives as long as the graph"
    loan.start_return()
    loan.continue_return()
    total = [torch.zeros(weight.numel()) for weight in home]
    for native, i, where, grad in loan.finish_return():
        assert native == 0
        total[i][where] += grad
    if rank == 0:
        for i, each in enumerate(total):
            ranks = size * (size - 1) // 2
            expected = ranks * (torch.arange(each.numel(), dtype=torch.float32) + i)
            assert torch.equal(each, expected)
    return {"noted": noted, "held": held, "bytes": Parcel.of(natives[0]).nbytes}


def assert_is_lent(mine: Any, lent: Any, recipe: Recipe, *, columns: bool) -> None:
    if not fp8_utils.is_float8tensor(mine):
        assert torch.equal(mine, lent)
        return
    assert type(lent) is type(mine)
    assert (lent.shape, lent.dtype, lent.requires_grad) == (mine.shape, torch.bfloat16, True)
    for name in INNER[recipe]:
        expected, actual = getattr(mine, name), getattr(lent, name)
        if not columns and name == "_columnwise_data":  # NaN
            assert (actual == 255).all()
            continue
        if not columns and name == "_columnwise_scale_inv":
            continue
        assert torch.equal(actual, expected), name
        assert actual.data_ptr() % 16 == 0
    assert torch.equal(read_numbers(lent), read_numbers(mine))
    if not columns and recipe == "mxfp8":
        assert read_numbers(lent, rowwise=False).isnan().all()
        return
    for each in (mine, lent):
        each.update_usage(columnwise_usage=True)
    by_columns = read_numbers(lent, rowwise=False)
    assert torch.equal(by_columns, read_numbers(mine, rowwise=False))
    assert torch.equal(by_columns, read_numbers(lent)) == (recipe != "mxfp8"), "columns of rows"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_borrower_gets_what_the_parameter_holds(recipe):
    settings = {"scatter_from": 0, "refetch": True, "drop_columns": False, "bias": False}

    def work(rank, size):
        whole = lend_to_all(rank, size, recipe, **settings)
        lend_to_all(rank, size, recipe, **settings | {"bias": True, "refetch": False})
        lend_to_all(rank, size, recipe, **settings | {"drop_columns": True})
        shards = lend_to_all(rank, size, recipe, **settings | {"scatter_from": 2})
        return whole, shards

    home, *borrowers = run_ranks(work, 4)
    width = PARCEL[recipe]
    numbers = 4 * sum(rows * columns for rows, columns in SHAPES)  # gradients in fp32
    whole, shards = home
    assert whole["bytes"] == width
    assert whole["held"] == 0
    assert whole["noted"] == 2 * [(3 * width, 0)] + [(0, 3 * numbers)]
    for whole, shards in borrowers:
        assert whole["held"] == shards["held"] == width
        assert whole["noted"] == 2 * [(0, width)] + [(numbers, 0)]
        assert sum(received for _, received in shards["noted"][:2]) == width
    # The home sends each byte once, borrowers send theirs to the two others, all twice.
    sent = sum(sent for _, shards in (home, *borrowers) for sent, _ in shards["noted"][:4])
    assert sent == 2 * 3 * width


def quantised_run(layout: Layout, **settings: Any) -> Run:
    config = {"fp8": "hybrid", "fp8_recipe": "tensorwise"} | settings.pop("config", {})
    return Run(
        layout=layout,
        routing=Routing("hot"),
        spec=use_te_experts,
        config=TE_CONFIG | config,
        **settings,
    )


FUSED = {"gradient_accumulation_fusion": True}


def compare_training(run: Run, recipe: Recipe, llep: LLEPConfig, **tolerances: float) -> int:
    """Train with and without LLEP; the most borrowers that an expert had."""
    decisions: list = []

    def convert(chunks: Chunks) -> None:
        quantise_experts(chunks, recipe)
        convert_model(chunks, llep)
        note_decisions(chunks, decisions)

    plain = train(run, transform_model=partial(quantise_experts, recipe=recipe))
    lending = train(run, transform_model=convert)
    count = 0
    for result in (plain, lending):
        for name, each in result.parameters.items():
            if fp8_utils.is_float8tensor(each):
                result.parameters[name] = read_numbers(each)
                count += 1
    assert count, "no parameter was quantised"
    assert_same_run(lending, plain, **tolerances)
    assert all(not gradient.isnan().any() for gradient in lending.gradients.values())
    return max(
        np.unique(decision.plan.transfers[:, 0], return_counts=True)[1].max(initial=0)
        for decision in decisions
    )


def evaluate_first(iterator, model, **settings):
    """A micro-batch, before which the same model is evaluated, in which TE may drop columns."""
    tokens = torch.arange(2 * 17).reshape(2, 17) % 64
    model.eval()
    layers = [each for each in model.modules() if isinstance(each, LLEPMoELayer)]
    if dist.get_rank() == 0:
        for weight in (each for layer in layers for each in layer.experts.parameters()):
            if isinstance(weight, te.Float8Tensor | te.Float8BlockwiseQTensor):
                weight.update_usage(rowwise_usage=True, columnwise_usage=False)
    with torch.no_grad():
        assert _forward_step(iter([tokens]), model)[0].isfinite().all()
    model.train()
    return _forward_step(iterator, model, **settings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_that_of_plain_megatron(recipe):
    overlapped = {"ddp": {"overlap_grad_reduce": True}}

    def work(rank, size):
        run = partial(quantised_run, Layout(ep=2))
        cases = {
            "kept": (run(config=FUSED), "keep"),
            "refetched": (run(config=FUSED, **overlapped), "refetch"),
            "not fused, biases": (run(config={"add_bias_linear": True}), "refetch"),
            "evaluated": (run(config=FUSED, forward_step=evaluate_first), "refetch"),
        }
        return {
            name: compare_training(case, recipe, replace(EAGER, foreign_weights=choice))
            for name, (case, choice) in cases.items()
        }

    for lent in run_ranks(work, 2, timeout=200):
        assert all(lent.values()), lent


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_expert_in_shards(recipe):
    def work(rank, size):
        run = quantised_run(Layout(ep=4), config=FUSED, micro_batches=4)
        llep = replace(EAGER, foreign_weights="refetch", scatter_from=2)
        return compare_training(run, recipe, llep)

    assert min(run_ranks(work, 4, timeout=200)) >= 2, "no expert had several borrowers"


@pytest.mark.parametrize("recipe", RECIPES)
def test_distributed_optimizer(recipe, monkeypatch):
    """It moves parameters into its buffer; MXFP8 comes out of that of the gradients."""
    monkeypatch.setattr(distrib_optimizer, "quantize_param_shard", quantise_from_shards)
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    reuse = {"reuse_grad_buf_for_mxfp8_param_ag": recipe == "mxfp8"}

    def work(rank, size):
        run = quantised_run(
            Layout(ep=2, dp=4),
            config=FUSED | bf16 | {"pipeline_dtype": torch.bfloat16},
            ddp={
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "fp8_param_gather": True,
                **reuse,
            },
            # A large epsilon keeps the gradient's scale.
            optimizer=bf16
            | reuse
            | {"fp8_recipe": recipe, "optimizer": "adam", "adam_eps": 1.0, "lr": 1.0},
        )
        return compare_training(run, recipe, EAGER, loss_tolerance=5e-3, gradient_tolerance=2e-2)

    assert all(run_ranks(work, 4, timeout=200))


def test_other_classes_are_refused():
    module = torch.nn.Module()
    for number, recipe in enumerate(RECIPES):
        weight = quantise(torch.randn(64, 64), recipe)
        module.register_parameter(f"weight{number}", torch.nn.Parameter(weight))
    check_lendable(module)
    module.weight1._is_2D_scaled = False
    with pytest.raises(ValueError, match=r"--fp8-param-gather: experts\.weight1 is a .*; use"):
        check_lendable(module)
    module.weight1._is_2D_scaled = True
    # As delayed scaling makes it.
    module.weight0._quantizer = te.Float8Quantizer(torch.ones(1), torch.zeros(1), DType.kFloat8E4M3)
    with pytest.raises(ValueError, match=r"--fp8-param-gather: experts\.weight0 .*Float8Quantizer"):
        check_lendable(module)
    module.weight0 = torch.nn.Parameter(quantise(torch.randn(64, 64), "mxfp8"))
    check_lendable(module)
    module.weight0._with_gemm_swizzled_scales = True
    with pytest.raises(ValueError, match=r"--fp8-param-gather: experts\.weight0 .*swizzled"):
        check_lendable(module)
